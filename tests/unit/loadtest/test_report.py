"""The report: one page that needs nothing else, with every figure and what it was measured with."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest

from loadtest.comparison import Side, compare, write_comparison
from loadtest.options import Options
from loadtest.record import Client, Record, Run, write_run
from loadtest.report import main, write_report
from tests.unit.loadtest.made import failed, record, run


def _requests(slower: float = 1.0, kinds: tuple[str, str] = ("stream", "long")) -> list[Record]:
    streams = [record(n, 2.1 + n / 4, 0.05 * slower, [0.02 * slower] * 40, kind=kinds[0]) for n in range(20)]
    long = [record(20 + n, 3.0 + 2 * n, 0.8 * slower, [0.03] * 10, kind=kinds[1], input_tokens=3000) for n in range(3)]
    return streams + long


def _run() -> Run:
    return run(kinds=("stream", "long"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with its report."""
    directory = tmp_path_factory.mktemp("run")
    write_run(directory, _run(), _requests())
    assert write_report(directory) == directory / "report.html"
    return directory


def test_the_page_has_all_figures_and_needs_nothing_else(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page), "nothing is fetched"
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page).replace("127.0.0.1", "")
    for text in ("stream", "long", "TTFT p50 / p90 / p99", "50\u00a0ms / 50\u00a0ms / 50\u00a0ms", "goodput per second"):
        assert text in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(captions) == 3
    for caption in captions:
        assert re.search(r"n: [\d,]+ ", caption)
        assert "8 s counted of 10 s" in caption
        assert "scripts/loadtest --duration 10" in caption
        assert "2 cores of Some CPU" in caption


def test_plots_take_their_colours_from_the_page_in_both_widths(made: Path) -> None:
    page = (made / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 6
    ids: list[str] = []
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--series-1)" in drawing
        assert not re.search(r"#0[0-9a]0[0-9]{3}\b", drawing), "a colour of ours is left"
        ids += re.findall(r'id="([^"]+)"', drawing)
        assert set(re.findall(r"url\(#([^)]+)\)", drawing)) <= set(re.findall(r'id="([^"]+)"', drawing))
    assert len(ids) == len(set(ids)), "ids of one plot would cut off another"
    assert "prefers-color-scheme: dark" in page
    assert "max-width: 640px" in page


def test_the_markdown_table_stands_on_its_own(made: Path) -> None:
    text = (made / "report.md").read_text()
    assert text.startswith("| | stream | long | all |\n|---|---|---|---|\n")
    assert "| ITL p50 / p90 / p99 | 20 ms / 20 ms / 20 ms |" in text
    assert "8 s counted of 10 s. Command: `scripts/loadtest --duration 10`. Machine: 2 cores of Some CPU" in text
    assert "µs per token" in text


def test_what_a_reader_must_know_first(tmp_path: Path) -> None:
    late = msgspec.structs.replace(_run(), client=Client(1.0, 5.0, 300.0, 900.0))
    short = record(3, 4.0, 0.1, [0.02])
    short.output_tokens_asked = 50
    records = [*(failed(n, 3.0, "HTTP 503: <full>") for n in range(2)), failed(2, 3.0, "broke"), short]
    write_run(tmp_path, late, records)
    page = write_report(tmp_path).read_text()
    assert "3 of 4 requests failed: 2 x HTTP 503: &lt;full&gt;; 1 x broke." in page
    assert "more than 300 ms late" in page
    assert "1 answers were shorter than asked" in page


def test_a_run_without_any_answer_still_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, _run(), [failed(0, 3.0, "refused")])
    assert "nothing arrived" in write_report(tmp_path).read_text()


def test_the_report_can_be_made_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (made / "report.html").read_text()
    assert main([str(made)]) == 0
    assert capsys.readouterr().out.strip() == str(made / "report.html")
    assert (made / "report.html").read_text() == before
    assert main([str(made / "nowhere")]) == 1
    assert "error: " in capsys.readouterr().err


# --- several deployments ---------------------------------------------------------------------------------------------------


def _sides() -> tuple[Side, Side]:
    """The second is two, four and three times as slow, by round."""
    first = Side("fast", [(_run(), _requests()) for _ in range(3)])
    return first, Side("slow", [(_run(), _requests(slower)) for slower in (2.0, 4.0, 3.0)])


def test_ratios_are_taken_within_rounds() -> None:
    found = {(one.kind, one.measure.name): one for one in compare(_sides())}
    ttft = found["stream", "TTFT p50"]
    assert list(ttft.values[0]) == pytest.approx([50, 50, 50])
    assert ttft.ratios(1) == pytest.approx([2, 4, 3])
    assert found["stream", "failed"].ratios(1) == []
    assert ("all", "TTFT p50") not in found, "says nothing over kinds that differ"
    assert ("all", "goodput per second") in found


def test_a_comparison_shows_medians_spread_and_ratios(tmp_path: Path) -> None:
    fast, slow = _sides()
    slow = Side("slow", [(msgspec.structs.replace(run, protocol="OpenAI chat"), records) for run, records in slow.runs])
    page = write_comparison(tmp_path, (fast, slow), "scripts/compare fast=a slow=b").read_text()
    assert "asked in different ways (OpenAI chat, gRPC)" in page
    text = (tmp_path / "report.md").read_text()
    assert "| stream: TTFT p50 | 50 ms (50 to 50 ms) | 150 ms (100 to 200 ms) | 3x (2x to 4x) |" in text
    assert "3 rounds of each, in turn; 8 s counted of 10 s each. scripts/compare fast=a slow=b. 2 cores of Some CPU" in text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(captions) == 4
    assert all("n: " in caption and "3 rounds" in caption and "Some CPU" in caption for caption in captions)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_every_other_side_is_compared_with_the_first(tmp_path: Path) -> None:
    fast, slow = _sides()
    sides = (fast, slow, Side("slower", [(_run(), _requests(slower)) for slower in (4.0, 8.0, 6.0)]))
    page = write_comparison(tmp_path, sides, "scripts/compare fast=a slow=b slower=c").read_text()
    assert "fast, slow and slower under the same load" in page
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("| | fast | slow | slower | slow / fast | slower / fast |\n")
    row = next(line for line in text.splitlines() if line.startswith("| stream: TTFT p50 |"))
    assert row.endswith("| 3x (2x to 4x) | 6x (4x to 8x) |")
    assert len(re.findall("<figcaption>", page)) == 5, "ratios of each"
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_two_slos_and_the_steps_of_a_ramp(tmp_path: Path) -> None:
    options = Options(duration=10.0, warmup=2.0, second_slo="ttft=60,itl=30")
    ramp = run(options, kinds=("stream", "long"), levels=((0.0, 0.5), (5.0, 1.0)))
    write_run(tmp_path, ramp, _requests())
    write_report(tmp_path)
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "second SLO" in line)
    assert row == "| goodput per second, second SLO (60 ms, 30 ms) | 2.5 (100%) | 0 (0%) | 2.5 (87%) |"
    sides = (Side("fast", [(ramp, _requests())] * 2), Side("slow", [(ramp, _requests(2.0))] * 2))
    page = write_comparison(tmp_path, sides, "scripts/compare fast=a slow=b").read_text()
    assert "second SLO: 60 ms, 30 ms" in page
    assert page.count("Second SLO") == 2, "a panel in both widths"
    assert "| stream: goodput per second, second SLO | 2.5 (2.5 to 2.5) | 0 (0 to 0) |" in (tmp_path / "report.md").read_text()
    made = json.loads((tmp_path / "comparison.json").read_text())
    (first, second), _ = made["goodput"]["fast"]
    assert (first["level"], second["level"]) == (0.5, 1.0)
    assert first["rate"] > first["second_goodput"] > 0


def test_a_comparison_leaves_every_value_for_other_programs(tmp_path: Path) -> None:
    write_comparison(tmp_path, _sides(), "scripts/compare fast=a slow=b")
    made = json.loads((tmp_path / "comparison.json").read_text())
    assert (made["first"], made["machine"]["cpu"], made["options"]["duration"]) == ("fast", "Some CPU", 10.0)
    found = {(one["kind"], one["measure"]): one for one in made["figures"]}
    assert found["stream", "TTFT p50"]["values"]["slow"] == pytest.approx([100, 200, 150])
    assert found["stream", "TTFT p50"]["ratios"] == {"slow": pytest.approx([2, 4, 3])}
