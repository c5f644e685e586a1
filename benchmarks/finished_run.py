"""Load the networks and files of a run that `train.py` has finished, for the other benchmarks."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_qat.data.image_datamodule import ImageDataModule
from lightning_qat.deployment import runtimes
from lightning_qat.deployment.deployed import DeployedModel
from lightning_qat.deployment.description import Description
from lightning_qat.deployment.onnx_export import save_onnx, to_onnx
from lightning_qat.deployment.openvino_export import is_installed, save_openvino
from lightning_qat.errors import UserError
from lightning_qat.quantization.torch_model import Int8Model, quantized_engine, torch_script
from lightning_qat.targets import checked, named_in

FILES = {"torchscript": ".ts", "onnx": ".onnx", "openvino": ".xml"}

Runtime = Callable[[Tensor], Tensor]
# Returns a new copy of a runtime with this number of threads. It must be new, because torch's
# oneDNN convolutions are fast only for the first batch size that they see.
Make = Callable[[int], Runtime]


@dataclass
class FinishedRun:
    """The content of a run directory of `stage=ptq` or `stage=qat`.

    Attributes:
        datamodule: data module before ``setup``.
        fp32, fake_quant, int8: networks that take normalized images. The last two are None if there
            is no checkpoint to convert.
        description: description of the INT8 files.
    """

    folder: Path
    datamodule: ImageDataModule
    fp32: nn.Module
    fake_quant: nn.Module | None
    int8: Int8Model | None
    description: Description

    def deployed(self, net: nn.Module) -> DeployedModel:
        """Return the network with this run's normalization as the first step."""
        return DeployedModel(net, self.datamodule.mean, self.datamodule.std)


def read(folder: Path) -> FinishedRun:
    """Compose the configuration of ``train.py`` again, and load the files of the run.

    Raises:
        UserError: this is no such directory, a required file is missing, or its configuration names
            a target that conf/ does not name.
    """
    settings = folder / ".hydra"
    if not (folder / "model_int8.ts").is_file() or not (settings / "config.yaml").is_file():
        raise UserError(
            f"{folder} is no finished run of stage=qat or stage=ptq: name a directory that holds "
            ".hydra/config.yaml and model_int8.ts, as train.py leaves it."
        )
    known = named_in(Path(__file__).parents[1] / "conf")
    hydra = OmegaConf.load(settings / "hydra.yaml").hydra
    OmegaConf.register_new_resolver("hydra", lambda key: OmegaConf.select(hydra, key), replace=True)
    cfg: Any = OmegaConf.load(settings / "config.yaml")
    # the path may be relative to the working directory
    cfg.fp32_ckpt = str(Path(hydra.runtime.cwd) / cfg.fp32_ckpt)
    file = settings / "config.yaml"
    data, model = checked(cfg.data, known, file), checked(cfg.model, known, file)
    datamodule = instantiate(data, _convert_="all")

    def fresh_module() -> Any:
        return instantiate(
            model,
            num_classes=datamodule.num_classes,
            mean=datamodule.mean,
            std=datamodule.std,
            _convert_="all",
        )

    checkpoints = [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    trained = next(filter(Path.is_file, checkpoints), None)
    fake_quant = int8 = None
    if trained is not None:
        callback = instantiate(checked(cfg.callbacks.result, known, file))
        callback.load(fresh_module(), trained)
        fake_quant, int8 = callback.networks["fake_quant"], callback.int8_model
    return FinishedRun(
        folder=folder,
        datamodule=datamodule,
        fp32=fresh_module().net.eval(),
        fake_quant=fake_quant,
        int8=int8,
        description=runtimes.load(folder / "model_int8.ts").description,
    )


def int8_artifacts(run: FinishedRun, skipped: dict[str, str]) -> dict[str, Make]:
    """Return the files of the run by name. Missing files go into ``skipped``."""
    makes: dict[str, Make] = {}
    for runtime, suffix in FILES.items():
        path, name = run.folder / f"model_int8{suffix}", f"int8_{runtime}"
        if not path.is_file():
            skipped[name] = f"the run has left no {path.name}"
        elif runtime == "openvino" and not _openvino_is_there(name, skipped):
            continue
        else:
            makes[name] = of_file(path)
    return makes


def of_file(path: Path) -> Make:
    """Return a function that loads an exported file."""
    return lambda threads: runtimes.load(path, threads)


def int8_eager(run: FinishedRun, skipped: dict[str, str]) -> dict[str, Make]:
    """Return the converted network, the same as `callback.int8_model`."""
    int8 = run.int8
    if int8 is None:
        skipped["int8_eager"] = "stage=ptq leaves no checkpoint to convert"
        return {}
    model = run.deployed(int8)

    def make(threads: int) -> Runtime:
        with quantized_engine(int8.engine):  # a copy packs its weights again
            return copy.deepcopy(model)

    return {"int8_eager": make}


def fp32_runtimes(run: FinishedRun, scratch: Path, skipped: dict[str, str]) -> dict[str, Make]:
    """Return the float network in every runtime, by name.

    Args:
        scratch: a folder for temporary files of the runtimes.
        skipped: receives the runtimes that are not possible here, with the reason.
    """
    # The weights in train.py are channels_last. fp32_eager uses torch's default layout.
    model = run.deployed(run.fp32)
    eager = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    makes: dict[str, Make] = {
        "fp32_eager": lambda _: eager,
        "fp32_channels_last": lambda _: (
            lambda images: channels_last(images.contiguous(memory_format=torch.channels_last))
        ),
        "fp32_torchscript": lambda _: torch_script(copy.deepcopy(model)),
    }
    size = run.datamodule.image_size
    proto = to_onnx(model, torch.rand(2, 3, size, size))
    description = dataclasses.replace(run.description, qconfig=None, accuracy=None)
    save_onnx(proto, scratch / "fp32.onnx", description)
    makes["fp32_onnx"] = of_file(scratch / "fp32.onnx")
    if _openvino_is_there("fp32_openvino", skipped):
        save_openvino(proto, scratch / "fp32.xml", description)
        makes["fp32_openvino"] = of_file(scratch / "fp32.xml")
    if torch.cuda.is_available():
        makes["fp32_cuda"] = lambda _: copy.deepcopy(model).cuda()
    else:
        skipped["fp32_cuda"] = "no GPU that torch can use"
    return makes


def _openvino_is_there(name: str, skipped: dict[str, str]) -> bool:
    if not is_installed():
        skipped[name] = "OpenVINO is not installed: pip install 'lightning_qat[openvino]'"
        return False
    return True
