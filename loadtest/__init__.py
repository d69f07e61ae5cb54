"""Load tests: what is sent and when, who sends it, what came back, and the report.

workload, traces, generators, shapes and scenarios decide what is sent and when, and do no I/O. protocols ask one server.
run and users join both in Locust. record, summary, plots and report are about what came back; they know no Locust.
"""
