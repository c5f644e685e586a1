"""A mistake in the command ends with status 2 and a message: what, why, what to do."""

from pathlib import Path

import pytest
import torch

from tests.bad_input.conftest import QUICK, Refused
from tests.conftest import Road, Train

pytestmark = pytest.mark.slow

# name: arguments, words of the message
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # groups and keys
    "unknown_stage": (["stage=fp23"], ["stage/fp23", "fp32"]),
    "unknown_data": (["data=cifar11"], ["data/cifar11", "digits"]),
    "unknown_model": (["model=resnet19"], ["model/resnet19", "resnet18"]),
    "unknown_qconfig": (["qconfig=x87"], ["qconfig/x87", "fbgemm"]),
    "unknown_trainer": (["trainer=tpus"], ["trainer/tpus", "ddp_cpu"]),
    "unknown_launcher": (["launcher=nothing"], ["launcher/nothing", "joblib"]),
    "unknown_experiment": (["experiment=nothing"], ["experiment/nothing", "sensitivity"]),
    "unknown_key": (["batchsize=3"], ["batchsize"]),
    "unknown_key_below": (["data.batchsize=3"], ["batchsize"]),
    "unknown_argument": (["+data.colour=red"], ["colour", "DigitsDataModule"]),
    "unknown_trainer_argument": (["+trainer.colour=red"], ["colour", "Trainer"]),
    "key_deleted": (["~model.momentum"], ["momentum"]),
    "unfinished_list": (["stage=[fp32"], ["[fp32"]),
    "no_root_for_digits": (["+data.root=x"], ["root", "DigitsDataModule"]),
    # data
    "batch_size": (["data.batch_size=0"], ["batch_size=0", ">= 1"]),
    "batch_size_word": (["data.batch_size=many"], ["batch_size='many'", ">= 1"]),
    "one_image_a_step": (["data.batch_size=1"], ["raise data.batch_size"]),
    "val_size": (["data.val_size=1437"], ["val_size=1437", "1437 training images"]),
    "seed": (["seed=lucky"], ["seed='lucky'", "integer"]),
    "seed_too_large": (["seed=99999999999"], ["seed=99999999999", "4294967295"]),
    "seed_switch": (["seed=true"], ["seed=True", "integer"]),
    "flip_word": (["data.flip=maybe"], ["flip='maybe'", "alternating"]),
    "padding_word": (["data.padding_mode=mirror"], ["padding_mode='mirror'", "reflect"]),
    "padding_too_wide": (["data.crop_padding=100000000000"], ["crop_padding=1000", "0 to 8"]),
    "cutout_too_wide": (["data.cutout=9"], ["cutout=9", "0 to 8"]),
    "std_zero": (["+data.std=[0,0.2,0.2]"], ["std[0]", "=0 is not permitted"]),
    "mean_number": (["+data.mean=5"], ["mean=5", "three values"]),
    "mean_words": (["+data.mean=[a,b,c]"], ["mean[0]", "'a'"]),
    "root_number": (["data=cifar10", "data.root=5"], ["data.root=5", "path"]),
    "cifar10_root_is_a_file": (["data=cifar10", f"data.root={__file__}"], [__file__]),
    # model and training
    "learning_rate": (["model.learning_rate=fast"], ["learning_rate='fast'", "number"]),
    "diverged": (["model.learning_rate=1e12"], ["loss became", "Lower model.learning_rate"]),
    "label_smoothing": (["model.label_smoothing=2"], ["label_smoothing=2", "0 to 1"]),
    "decay_all": (["model.decay_all=some"], ["decay_all='some'", "true or false"]),
    "compile": (["model.compile=fast"], ["compile='fast'", "reduce-overhead"]),
    "nesterov": (["model.momentum=0"], ["model.momentum above 0"]),
    "momentum_too_large": (["model.momentum=2"], ["model.momentum=2", "0 to 1"]),
    "milestones": (["model.milestones=5"], ["model.milestones=5", "list"]),
    "milestones_words": (["model.milestones=[soon]"], ["model.milestones[0]='soon'", ">= 1"]),
    "stem": (["model.net.stem=imagenett"], ["imagenett", "cifar or imagenet"]),
    "scale_learning_rate": (
        ["model.scale_learning_rate=fast"],
        ["scale_learning_rate='fast'", "number"],
    ),
    "max_epochs": (["trainer.max_epochs=0"], ["trainer.max_epochs=0", ">= 1"]),
    "accelerator": (["trainer.accelerator=abacus"], ["abacus", "trainer"]),
    "no_gpu": (["trainer=gpu"], ["gpu", "trainer=auto"]),
    "precision": (["trainer.precision=5"], ["precision", "trainer"]),
    "limit": (
        ["trainer.limit_train_batches=few"],
        ["refuses a value of trainer.*", "trainer.limit_train_batches=few"],
    ),
    "limit_zero": (["trainer.limit_train_batches=0"], ["limit_train_batches=0 trains nothing"]),
    "log_every": (["trainer.log_every_n_steps=x"], ["log_every_n_steps='x'", ">= 0"]),
    "deterministic_word": (["trainer.deterministic=maybe"], ["deterministic='maybe'"]),
    # stages and quantization
    "freeze_word": (
        ["stage=qat", "callbacks.result.freeze_observer_epoch=soon"],
        ["freeze_observer_epoch='soon'"],
    ),
    "saturation_word": (["stage=qat", "allow_saturation=no_way"], ["allow_saturation='no_way'"]),
    "too_many_bits": (
        ["stage=ptq", "qconfig=custom", "qconfig.weight_bits=9"],
        ["qconfig.weight_bits=9", "2 to 8"],
    ),
    "no_bits": (
        ["stage=ptq", "qconfig=custom", "qconfig.activation_bits=0"],
        ["qconfig.activation_bits=0", "2 to 8"],
    ),
    "no_such_scales": (
        ["stage=qat", "qconfig=custom", "qconfig.scales=lerned"],
        ["scales='lerned'", "learned_offset"],
    ),
    "no_such_engine": (
        ["stage=ptq", "qconfig=custom", "qconfig.engine=tensorrt"],
        ["engine='tensorrt'", "qnnpack"],
    ),
    "distill_word": (["stage=qat", "distill=a_bit"], ["distill='a_bit'", "true or false"]),
    "only_one_layer": (["stage=ptq", "only=layer9"], ["no layer 'layer9'", "layer4"]),
    "override_number": (["stage=ptq", "overrides={fc:9}"], ["qconfig must be one of"]),
    "overrides_word": (["stage=ptq", "overrides=fc"], ["overrides='fc'", "mapping"]),
    # settings that are used after the training, but refused before it
    "latency_forever": (["latency_seconds=inf"], ["latency_seconds=inf", ">= 0"]),
    "latency_word": (["latency_seconds=long"], ["latency_seconds='long'", ">= 0"]),
    "export_word": (["export_onnx=maybe"], ["export_onnx='maybe'", "true or false"]),
    "uint8_word": (["uint8_input=maybe"], ["uint8_input='maybe'", "true or false"]),
    "budget_negative": (["budget.megabytes=-1"], ["budget.megabytes=-1", ">= 1e-06"]),
    "budget_nan": (["budget.milliseconds=nan"], ["budget.milliseconds=nan"]),
    "budget_number": (["budget=5"], ["budget=5", "budget.megabytes"]),
    "budget_of_a_sweep": (["-m", "budget.megabytes=0", "seed=0,1"], ["budget.megabytes=0"]),
    "fp32_not_first": (["-m", "stage=ptq,fp32"], ["stage=ptq,fp32", "put it first"]),
    "fp32_beside_the_others": (
        ["-m", "stage=fp32,ptq", "launcher=joblib"],
        ["at the same time", "run -m stage=fp32 first"],
    ),
    "one_file_for_two_trainings": (
        ["-m", "stage=fp32,ptq", "recipe.fp32.epochs=1,2"],
        ["'fp32_ckpt=${output_dir}/fp32/${recipe.fp32.epochs}.ckpt'"],
    ),
    "budget_unknown": (["-m", "+budget.watts=5", "seed=0,1"], ["watts", "budget.milliseconds"]),
    # files
    "weights_number": (["model.weights=5"], ["5", "path"]),
    "weights_of_the_stage_before": (
        ["stage=ptq", "model.weights=x.ckpt"],
        ["use fp32_ckpt=FILE"],
    ),
    "ckpt_number": (["ckpt_path=5"], ["5", "path"]),
    "fp32_ckpt_null": (["stage=qat", "fp32_ckpt=null"], ["set fp32_ckpt to their file"]),
    "fp32_ckpt_empty": (["stage=fp32", "fp32_ckpt="], ["fp32_ckpt=''", "set it to a path"]),
    "fp32_ckpt_empty_read": (["stage=qat", "fp32_ckpt="], ["checkpoint=''", "set it to a path"]),
    "fp32_missing": (
        ["stage=qat", "fp32_ckpt=nowhere.ckpt"],
        ["nowhere.ckpt", "python train.py stage=fp32 data=digits model=resnet18 seed=0"],
    ),
    "resume_missing": (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "last.ckpt"]),
    "folder_missing": (["data=folder", "data.root=nowhere"], ["nowhere"]),
    "folder_unset": (["data=folder"], ["data.root"]),
    "fp32_ckpt_is_a_folder": (["fp32_ckpt=/tmp"], ["fp32_ckpt=/tmp"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_and_nothing_is_overwritten(
    name: str, refused: Refused, road: Road
) -> None:
    if name == "no_gpu" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    args, words = MISTAKES[name]
    multirun, rest = [x for x in args if x == "-m"], [x for x in args if x != "-m"]
    refused(
        *multirun,
        "data=digits",
        "trainer.max_epochs=1",
        f"output_dir={road.output_dir}",
        *rest,
        words=words,
        unchanged=road.output_dir,
    )


@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["single", "multirun"])
def test_output_dir_that_cannot_be_made(
    multirun: list[str], refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    refused(*multirun, *QUICK, f"output_dir={tmp_path}/file/outputs", words=["output_dir"])


def test_a_training_of_nothing_does_not_replace_trained_weights(
    train: Train, road: Road, tmp_path: Path
) -> None:
    """Use another output folder, and the checkpoint as the file that the run would write."""
    kept = tmp_path / "trained.ckpt"
    kept.write_bytes(road.fp32_ckpt.read_bytes())
    status, _ = train(*QUICK, f"fp32_ckpt={kept}", "trainer.limit_train_batches=0")
    assert status == 2
    assert kept.read_bytes() == road.fp32_ckpt.read_bytes()
