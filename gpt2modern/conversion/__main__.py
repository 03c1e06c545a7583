"""Run the conversion as `python -m gpt2modern.conversion`."""

from gpt2modern.conversion.convert import main

if __name__ == "__main__":
    main()
