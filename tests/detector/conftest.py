"""One thread for each process: the tests run side by side, and threads that wait for each other's cores crawl."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
