"""`transformers serve` (an OpenAI-compatible server) over a patched model."""

from __future__ import annotations

from typing import Any

from transformers.cli.serve import Serve

from vlmaccel.patching import MethodLike, patch


class PatchedServe(Serve):
    """The server of `transformers serve MODEL`, with the model patched before it listens. It runs in a thread.

    model: local directory or hub id; all requests go to it. method, options: as `vlmaccel.patch(model, method, **options)`
    takes them. server: other arguments of `transformers.cli.serve.Serve`, e.g. host, port, device, dtype.

    Text models cannot be served with `continuous_batching=True`: a patched model refuses it (transformers itself does not
    do it for vision-language models). Raises ImportError without `pip install "transformers[serving]"`, and what
    `vlmaccel.patch` raises.
    """

    def __init__(
        self, model: str, method: MethodLike = None, options: dict[str, object] | None = None, **server: Any
    ) -> None:
        self._method, self._options = method, options or {}
        super().__init__(force_model=model, non_blocking=True, **server)

    def start_server(self) -> None:
        """Load and patch the model, then listen. Called at the end of `Serve.__init__`."""
        manager = self._model_manager
        model, _ = manager.load_model_and_processor(manager.process_model_name(manager.force_model))
        self.model = patch(model, self._method, **self._options)
        super().start_server()

    def wait(self) -> None:
        """Serve until interrupted."""
        try:
            self._thread.join()
        finally:
            self.kill_server()
