"""Every tensor of every model, in one table: read by the codecs, by the test that compares config.pbtxt, and by the docs.

The router speaks the names of TensorRT-LLM's `ensemble` and of Triton's vLLM backend, so that their clients work.
`max_batch_size` is 1 there: a tensor of dims [1] travels as [1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dims: without the batch dimension, -1 is any length. `dtype` is Triton's, without TYPE_."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    meaning: str
    optional: bool = True


def _one(name: str, dtype: str, meaning: str) -> TensorSpec:
    return TensorSpec(name, dtype, (1,), meaning)


def _many(name: str, dtype: str, meaning: str) -> TensorSpec:
    return TensorSpec(name, dtype, (-1,), meaning)


ROUTER_INPUTS: tuple[TensorSpec, ...] = (
    # the prompt: exactly one of these
    _one("text_input", "STRING", "The prompt as text. Special tokens are added as the tokenizer does."),
    _one("messages", "STRING", 'A chat as JSON, `[{"role": "user", "content": "..."}]`; the chat template is applied.'),
    _many("input_ids", "INT32", "The prompt as token ids."),
    # what to produce
    _one("max_tokens", "INT32", "New tokens at most. Default: router.default_max_tokens."),
    _one("min_tokens", "INT32", "New tokens before any stop counts. Default 0."),
    _one("min_length", "INT32", "Alias of min_tokens."),
    _one("stream", "BOOL", "true: one response per piece of text. false (default): one response with the whole text."),
    _one("streaming", "BOOL", "Alias of stream."),
    _many("stop_words", "STRING", "Strings that end the text; they are not part of it. At most 16."),
    _one("end_id", "INT32", "A token id that ends the text, besides the model's own. One outside the vocabulary never does."),
    _one("exclude_input_in_output", "BOOL", "true (default): the completion alone. false: text_output begins with text_input."),
    # how tokens are chosen; without any of them the choice is greedy
    _one("temperature", "FP32", "0 is greedy. Default 1 when any of the others below is given."),
    _one("top_k", "INT32", "Draw from the k likeliest tokens; 0 is all."),
    _one("top_p", "FP32", "Draw from the smallest set whose probability reaches p."),
    _one("min_p", "FP32", "Draw from tokens at least so likely relative to the likeliest."),
    _one("seed", "UINT64", "Same seed, same text, on any worker and in any batch. Default: drawn per request."),
    _one("random_seed", "UINT64", "Alias of seed."),
    _one("repetition_penalty", "FP32", "Above 1 makes tokens of prompt and output less likely."),
    _one("presence_penalty", "FP32", "-2 to 2, subtracted once from tokens of the output."),
    _one("frequency_penalty", "FP32", "-2 to 2, subtracted per occurrence in the output."),
    _one(
        "sampling_parameters",
        "STRING",
        "JSON object of sampling parameters (docs/api.md); values may be strings. Tensors given besides it win.",
    ),
    _one("guided_decoding_guide_type", "STRING", "What the answer is held to: json, json_schema, regex or ebnf_grammar."),
    _one("guided_decoding_guide", "STRING", "The JSON schema, regular expression or grammar (GBNF or Lark) of it."),
    # how it is served
    _one("cache_salt", "STRING", "Tenant: prefixes are shared only between requests of the same salt."),
    _one("priority", "INT32", "Lower is served first. Default 0."),
    _one("slo_ttft_ms", "FP32", "Time to first token aimed at, ms; 0 is no target. Default: router.slo.ttft_ms."),
    _one("slo_itl_ms", "FP32", "Time between two tokens aimed at, ms; 0 is no target. Default: router.slo.itl_ms."),
    _one(
        "route",
        "STRING",
        "remote, local or aggregated force how this request is served, auto lets the router predict. Default: router.mode.",
    ),
    _one("stop", "BOOL", "Accepted for clients that send it; true is refused: cancel the request instead."),
    # what to return besides text_output
    _one("return_finish_reason", "BOOL", "finish_reason."),
    _one("return_num_input_tokens", "BOOL", "num_input_tokens."),
    _one(
        "return_num_output_tokens", "BOOL", "num_output_tokens; a stream then tells every token at once, even before its text."
    ),
    _one("return_log_probs", "BOOL", "output_log_probs and cum_log_probs."),
    _one("return_logprobs", "BOOL", "logprobs."),
    _one("return_cumulative_logprob", "BOOL", "cum_log_probs."),
    _one("return_output_ids", "BOOL", "output_ids; a stream then tells every token at once, even before its text."),
    _one("return_proof", "BOOL", "proof."),
    _one("return_perf_metrics", "BOOL", "proof, and the four times in nanoseconds."),
    # of TensorRT-LLM clients: accepted with the one value that means nothing is wanted
    _one("beam_width", "INT32", "Must be 1."),
    _one("num_return_sequences", "INT32", "Must be 1."),
    _one("length_penalty", "FP32", "Has no meaning without beams; ignored."),
    _one("pad_id", "INT32", "Ignored: nothing is padded."),
    _many("bad_words", "STRING", "Must be empty; use logit_bias in sampling_parameters."),
    _one("return_context_logits", "BOOL", "Must be false."),
    _one("return_generation_logits", "BOOL", "Must be false."),
    _one("lora_task_id", "UINT64", "Must be 0."),
)

ROUTER_OUTPUTS: tuple[TensorSpec, ...] = (
    _one("text_output", "STRING", "The new text (stream) or the whole text."),
    _one("finish_reason", "STRING", "stop or length on the last response, empty before."),
    _one("num_input_tokens", "INT32", "Tokens of the prompt."),
    _one("num_output_tokens", "INT32", "Tokens in this response; their sum is the number of tokens produced."),
    _many("output_ids", "INT32", "Token ids in this response."),
    _many("output_log_probs", "FP32", "Log-probability of each token in this response."),
    _one("cum_log_probs", "FP32", "Sum of the log-probabilities so far."),
    _one("logprobs", "STRING", "JSON, per token: {token_id: {logprob, rank, decoded_token}} of the sampled and the likeliest."),
    _one("proof", "STRING", "JSON, on the last response: route and why, KV tokens and bytes moved, digest, TTFT in parts."),
    _one("arrival_time_ns", "INT64", "Wall clock, on the last response."),
    _one("first_scheduled_time_ns", "INT64", "Wall clock, on the last response."),
    _one("first_token_time_ns", "INT64", "Wall clock, on the last response."),
    _one("last_token_time_ns", "INT64", "Wall clock, on the last response."),
)

WORK = TensorSpec("work", "UINT8", (-1,), "Signed work of a router (core/messages.py).", optional=False)
ACCEPTED = TensorSpec("accepted", "INT32", (1,), "Pieces of work taken.", optional=False)
ROLE_PARAMETER = "role"
"""Of a worker's model configuration: what it is loaded as, where that is not what the deployment says."""

MODELS: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
    "router": (ROUTER_INPUTS, ROUTER_OUTPUTS),
    "prefill": ((WORK,), (ACCEPTED,)),
    "decode": ((WORK,), (ACCEPTED,)),
    "aggregated": ((WORK,), (ACCEPTED,)),
}
