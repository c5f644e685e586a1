"""Training, resuming, ONNX and the INT8 model work in a future torch without torch.ao."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import TRAIN

PROGRAM = """
import copy, pickle, sys
import pytorch_lightning as pl, torch, torchvision
for name in ["torch.ao.quantization", "torch.ao.nn", *sys.modules]:
    if name.startswith(("torch.ao.quantization", "torch.ao.nn")):
        sys.modules[name] = None  # what torch itself has imported, too

from lightning_qat import QuantizationAwareTraining, to_onnx
from tests.quantization.networks import SmallModule, images, loader

def fit(epochs, ckpt_path=None):
    torch.manual_seed(0)
    module, callback = SmallModule(), QuantizationAwareTraining("x86")
    trainer = pl.Trainer(max_epochs=epochs, logger=False, enable_progress_bar=False,
                         default_root_dir=sys.argv[1], callbacks=[callback])
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, callback, trainer.checkpoint_callback.best_model_path

_, _, path = fit(1)
module, callback, _ = fit(2, path)
straight, _, _ = fit(2)
for name, weight in straight.state_dict().items():
    assert torch.equal(weight, module.state_dict()[name]), name
int8_model, (x, _) = callback.int8_model, images(count=7, seed=3)
with torch.no_grad():
    expected = module.eval().net(x)
assert type(int8_model).__name__ == "OnnxModel"
for model in (int8_model, pickle.loads(pickle.dumps(int8_model)), copy.deepcopy(int8_model)):
    assert torch.equal(model(x), expected)
assert int8_model(torch.rand(2, 3, 12, 12)).shape == (2, 4)  # another size
assert "QuantizeLinear" in {node.op_type for node in to_onnx(int8_model).graph.node}
"""


def test_all_but_torchs_kernels_works_without_torch_ao(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=TRAIN.parent,
    )
    assert done.returncode == 0, done.stderr
