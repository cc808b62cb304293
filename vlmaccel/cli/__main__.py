"""`python -m vlmaccel.cli`, which `accelerate launch` can start."""

from vlmaccel.cli import app

app()
