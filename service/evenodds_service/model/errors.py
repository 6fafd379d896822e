"""What can go wrong in the model room. Each error carries a stable `code`; only `api` knows statuses."""

from __future__ import annotations


class ModelError(Exception):
    """Root of this room's errors. The message names the thing, what is wrong with it, and the next step."""

    code = "model_error"


class EmbedderUnavailable(ModelError):
    """The embedding model could not be opened, or gave no usable vectors when it was tried."""

    code = "embedder_unavailable"


class DeviceUnavailable(ModelError):
    """The named torch device does not exist here, or cannot be used."""

    code = "device_unavailable"


class TorchMissing(ModelError):
    """A prediction needs torch, and this process was installed without it."""

    code = "torch_missing"
