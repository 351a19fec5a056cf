"""`lora-cache demo`: a real vLLM, a real chat model, six adapters and two slots."""
