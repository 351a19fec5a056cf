"""``python -m lora_cache`` is ``lora-cache``."""

from lora_cache.cli import main

if __name__ == "__main__":
    main()
