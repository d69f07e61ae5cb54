"""vLLM's own disaggregated prefill: two instances and a proxy. Runs in vLLM's environment, with aiohttp and psutil of it."""
