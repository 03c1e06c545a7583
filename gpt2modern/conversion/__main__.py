"""Run the conversion between GPT2-Modern and stock models for `python -m gpt2modern.conversion`."""

from gpt2modern.conversion.convert import main

if __name__ == "__main__":
    main()
