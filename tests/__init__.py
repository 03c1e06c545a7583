"""What the parts promise. Processes stay offline and small, as the environment says before anything is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
