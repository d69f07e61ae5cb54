"""As in tensorrt_llm.executor: errors and results."""
