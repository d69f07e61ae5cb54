"""As in tensorrt_llm.llmapi: the reader of YAML files."""
