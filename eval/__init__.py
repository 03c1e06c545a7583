import gpt2modern  # noqa: F401  before torch is imported, as it refuses a deleted working directory
