"""TensorRT-LLM behind the engine contract. Its own words, context for prefill and generation for decode, stay in here."""
