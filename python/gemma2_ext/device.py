"""Which devices a model can run on, and why another is refused."""

from __future__ import annotations

import torch

from . import _C

# Ampere: bfloat16 in the tensor cores, and asynchronous copies to shared memory.
LEAST_CAPABILITY = (8, 0)


def has_kernels(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures runs on a GPU of this compute capability.

    Args:
        architectures: as in GEMMA2_EXT_CUDA_ARCHS, e.g. "80;90a;100;120". A number's kernels run on
            its major from its minor on, with a letter behind it on that very one; numbers from 100
            on and the last of all also have PTX, which serves later ones.
    """
    names = architectures.split(";")
    wanted = 10 * capability[0] + capability[1]
    for name in names:
        if not name.isdigit():
            if int(name[:-1]) == wanted:
                return True
            continue
        has_ptx = int(name) >= 100 or name == names[-1]
        if int(name) <= wanted and (has_ptx or int(name) // 10 == capability[0]):
            return True
    return False


def check_device(device: torch.device | str) -> torch.device:
    """The device, with its index, after checking that the ops can run there.

    Args:
        device: "cpu", "cuda", "cuda:1" or the like.

    Raises:
        NotImplementedError: another kind of device; a build of gemma2_ext or torch without CUDA; a
            GPU older than LEAST_CAPABILITY, or one that the build has no kernels for.
        RuntimeError: no GPU, no such GPU, or torch and gemma2_ext are of two CUDA majors.
        ValueError, TypeError: no device at all.
    """
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"Gemma2: device must be a torch.device or str, got {device!r}")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"Gemma2: device must be cpu or cuda, got {device!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise NotImplementedError(f"Gemma2: only cpu and cuda are supported, got {device}")
    built = _C.build_info()
    if torch.version.cuda is None:
        raise NotImplementedError(
            f"Gemma2: device {device}: PyTorch {torch.__version__} is built without CUDA; install "
            "one with it, then gemma2_ext again"
        )
    if not built["cuda"]:
        raise NotImplementedError(
            f"Gemma2: device {device}: this build of gemma2_ext has no CUDA kernels; install it "
            "again where nvcc is on PATH or in CUDA_HOME (GEMMA2_EXT_CUDA=ON makes that an error)"
        )
    if torch.version.cuda.split(".")[0] != str(built["cuda_version"]).split(".")[0]:
        raise RuntimeError(
            f"Gemma2: device {device}: gemma2_ext was built for CUDA {built['cuda_version']}, "
            f"PyTorch {torch.__version__} uses CUDA {torch.version.cuda}; install gemma2_ext again"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(f"Gemma2: device {device}: no GPU, or no driver for CUDA was found")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise RuntimeError(f"Gemma2: device {device}: there are {count} GPUs, cuda:0 on")
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        raise NotImplementedError(
            f"Gemma2: device cuda:{index}, {torch.cuda.get_device_name(index)}, has compute "
            f"capability {capability[0]}.{capability[1]}; the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later"
        )
    if not has_kernels(str(built["cuda_architectures"]), capability):
        raise NotImplementedError(
            f"Gemma2: device cuda:{index}, {torch.cuda.get_device_name(index)}, has compute "
            f"capability {capability[0]}.{capability[1]}; this build of gemma2_ext is for "
            f"{built['cuda_architectures']}: install it again with GEMMA2_EXT_CUDA_ARCHS"
        )
    return torch.device("cuda", index)
