"""Every setting of `ocd.toml`: its default, range, unit, one-line meaning and class. The only home of a default."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from stages.foundation.setting import Auto, Count, Device, Table, execution, extent, identity

# What `train-diffusion.objective` stands for.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "paper": {},
    "task": {"neighbours": 5, "tune_after": "auto", "conditioning_noise": 0.3},
}


class RunTable(Table):
    title: ClassVar[str] = "where the results go, and what every stage shares"
    directory: str = execution("run", "folder of the results, relative to this file")
    seed: int = identity(0, "seed of every random draw", ge=0, lt=2**63)
    device: Device = execution("auto", "auto takes cuda where there is one, else cpu; mps, never by itself")
    threads: Count | Auto = execution(
        "auto", "CPU threads; auto: one to train small networks, else torch's choice; 1 where other work shares the cores"
    )


class TaskTable(Table):
    title: ClassVar[str] = "the model, its loss and its data"
    model: str | None = identity(None, 'callable that returns the model, "module:name"')
    model_args: dict[str, JsonValue] = identity({}, "keyword arguments for it")
    class_: str | None = identity(None, 'a Task class instead of model, loss and data, "module:Name"', alias="class")
    args: dict[str, JsonValue] = identity({}, "keyword arguments for the Task class")
    weights: str | None = execution(
        None, "trained weights to import (.safetensors, .pt, an index of shards, a folder); without, train-base trains"
    )
    weights_key: str | None = execution(None, "entry of that file to take, such as state_dict_ema; without, the one that fits")
    loss: str | None = identity(
        None, 'cross_entropy, binary_cross_entropy, mse, mae, huber, or "module:name": (output, y) -> (B,)'
    )
    kind: Literal["classification", "regression", "other"] | None = identity(
        None, "how outputs are combined and scored; known for the built-in losses"
    )
    train: str | None = execution(None, 'npz file with arrays x and y, or "module:name" of a Dataset')
    test: str | None = execution(None, "the same, for testing")
    validation: str | None = execution(None, "the same, for early stopping; without, a part of train is held out")
    validation_fraction: float = identity(0.1, "part of train held out when validation is not set", gt=0, lt=1)
    validation_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = identity(
        None, "seed that chooses it, by default run.seed; the same for runs that are to be compared"
    )


class TrainBaseTable(Table):
    title: ClassVar[str] = "the default trainer of the base, unless weights are imported"
    optimizer: Literal["adam", "sgd"] = identity("adam", "sgd has momentum 0.9")
    lr: float = identity(1e-3, "learning rate", gt=0)
    weight_decay: float = identity(0.0, "decoupled for adam", ge=0)
    batch_size: int = identity(64, "samples a step", ge=1)
    epochs: int = extent(20, "passes over the training samples, at most", ge=1)
    patience: int = identity(
        5, "epochs in which the validation loss falls by less than 1 % before stopping; 0: never stop early", ge=0
    )


class SelectLayerTable(Table):
    title: ClassVar[str] = "which weight OCD changes (Eq. 6)"
    layer: str = identity("auto", "a parameter name such as fc1.weight; auto takes the highest score")
    draws: int = identity(1000, "perturbations a candidate (the paper: 10000); 0: no scores, layer must be named", ge=0)
    samples: int = identity(64, "training samples the score is summed over", ge=1)
    sigma: float = identity(0.1, "noise, in standard deviations of the layer's own weights", gt=0)


class CollectTable(Table):
    title: ClassVar[str] = "overfitting: a few gradient steps for each sample, on the layer alone"
    optimizer: Literal["adam", "sgd"] = identity("adam", "sgd is plain gradient descent, unless momentum is set")
    lr: float = identity(5e-4, "learning rate", gt=0)
    steps: int = identity(3, "gradient steps a sample, unless until_converged", ge=1)
    momentum: float = identity(0.0, "of sgd", ge=0, lt=1)
    weight_decay: float = identity(0.0, "of sgd, towards zero", ge=0)
    until_converged: bool = identity(False, "step until the gradient's norm has fallen to tolerance times its first")
    tolerance: float = identity(0.1, "share of the first gradient's norm, for until_converged", gt=0, lt=1)
    max_steps: int = identity(100, "gradient steps a sample at most, for until_converged", ge=1)
    split: Literal["train", "validation", "all"] = identity(
        "train", "rows of train to overfit: those the base was trained on, those held out from it, or both"
    )
    samples: Count | Literal["all"] = extent("all", "how many of them, in a seeded order")
    repeats: int = identity(1, "overfits of each sample, each with other parts of it, for tasks that draw them: view()", ge=1)
    condition_on_x: bool = identity(False, "also condition on x itself, which the paper does not: a further field, x")
    store: Literal["auto", "dense", "factored"] = identity(
        "auto", "factored: two factors in place of each delta; auto: where sgd makes it one outer product"
    )
    skip_bad: bool = identity(False, "leave samples out whose numbers are not finite, instead of stopping")
    batch_size: Count | Auto = execution("auto", "samples overfitted at once; auto: by cache and memory")
    block_samples: Count | Auto = execution("auto", "samples a block: the unit of writing and of resuming")
    writers: Count | Auto = execution(
        "auto", "threads that compress and write; auto: one, two on four cores and more, up to eight beside a GPU"
    )


class TrainDiffusionTable(Table):
    title: ClassVar[str] = "the conditional diffusion model of the unit delta (Alg. 1)"
    # What it changes is in the identity of the settings that it stands for.
    objective: Literal["paper", "task"] = execution(
        "paper",
        "stands for other settings, unless these are given; paper: on deltas alone (Alg. 1); task: then by the task's loss, "
        'told of neighbours: neighbours = 5, tune_after = "auto", conditioning_noise = 0.3',
    )
    preset: Literal["auto", "mlp", "factored", "vector", "paper", "authors", "small"] = identity(
        "auto",
        "denoiser; auto: vector where the store has factors, else mlp for deltas of up to 4,096 numbers, else factored; "
        "see Choosing a preset",
    )
    width: Annotated[int, Field(ge=8, multiple_of=2)] | Auto = identity(
        "auto",
        "hidden width, even (U-Nets: channels); auto: about 4·sqrt(out·in), 256 (vector), 128 (paper, authors), 32 (small)",
    )
    blocks: Count | Auto = identity("auto", "residual blocks (U-Nets: at each level); auto: 3, 2 (paper, authors), 1 (small)")
    rank: int = identity(8, "outer products the factored preset's answer is the sum of", ge=1)
    multipliers: Annotated[list[Count], Field(min_length=1)] | Auto = identity(
        "auto", "channels of a U-Net's resolutions, in widths; auto: 1, 1, 2, 2, 4, 4, or 1, 2, 2, 4 (small)"
    )
    attention_max_tokens: Annotated[int, Field(ge=0)] | Auto = identity(
        "auto", "U-Nets attend where a resolution has at most so many positions; auto: 1024, 256 (authors, small)"
    )
    pad_to: Count | Auto = identity("auto", "U-Nets see deltas padded to multiples of this; auto: as needed, 128 (authors)")
    dropout: Annotated[float, Field(ge=0, lt=1)] | Auto = identity("auto", "in a U-Net's blocks; auto: 0, 0.4 (authors)")
    encoders: dict[str, str] = identity(
        {}, 'encoder of a conditioning field: linear (default), vgg11 for pictures, spectrogram for sounds, or "module:name"'
    )
    encoder_weights: str | None = execution(None, "safetensors file of VGG-11's weights, which then stay as they are")
    prediction: Literal["auto", "epsilon", "x0", "mean"] = identity(
        "auto",
        "what the denoiser outputs; auto: epsilon for U-Nets, else x0; mean: no diffusion, one pass regresses the delta",
    )
    schedule: Literal["ddpm", "authors", "paper"] = identity("ddpm", "noise schedule")
    lr: Annotated[float, Field(gt=0)] | Auto = identity(
        "auto", "learning rate; auto: 7e-4 (mlp), 1.4e-3 (factored), 1e-3 (vector), 1e-4 (U-Nets)"
    )
    lr_schedule: Literal["constant", "cosine"] = identity(
        "constant", "cosine falls to zero at max_steps, and makes max_steps part of the result"
    )
    batch_size: Count | Auto = identity("auto", "deltas a step; auto: 128 for U-Nets, else 256")
    conditioning_noise: float = identity(
        0.0,
        "Gaussian noise on the normalised conditioning while training, which keeps few samples from being learned by heart",
        ge=0,
    )
    neighbours: int = identity(
        0, "nearest other training samples whose deltas and errors condition both networks; 0: none, as in the paper", ge=0
    )
    neighbours_in: Literal["auto", "coordinates", "x", "layer_input"] = identity(
        "auto",
        "what samples are near in; auto: the task's coordinates() where it has them, else x, else what the layer sees",
    )
    tune_after: Annotated[int, Field(ge=0)] | Auto = identity(
        0,
        "steps on the deltas, after which the denoiser is tuned by the task's own loss with its deltas applied; 0: never; "
        "auto: at the first evaluation at which the held-out loss on deltas has fallen by less than a tenth within two",
    )
    tune_samples: Count | Auto = identity(
        "auto", "samples a step of tuning, at most batch_size; auto: 64, fewer where a pass takes over a GiB, at least 4"
    )
    tune_members: int = identity(
        1, "draws of each sample in tuning, by the loss of all together: of their combination, or the fair energy score", ge=1
    )
    max_steps: int = extent(10_000, "gradient steps, at most", ge=1)
    patience: int = identity(
        10, "evaluations in which the held-out loss falls by less than 1 % before stopping; 0: never stop early", ge=0
    )
    evaluate_steps: int = identity(200, "steps between evaluations on held-out deltas", ge=1)
    held_out: float = identity(0.05, "part of the store kept for evaluation, at most 512 deltas", gt=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = identity(
        "auto", "of the products in training; auto: bfloat16 on cuda, else float32"
    )
    micro_batch_size: Count | Auto = execution("auto", "deltas of a batch in memory at once; auto: as many as fit and pay")
    store_memory: Annotated[float, Field(ge=0)] | Auto = execution(
        "auto", "GiB of memory the store may be kept in, else it is read while training; auto: half of what is free"
    )
    compile: bool | Auto = execution(
        "auto", "torch.compile the denoiser, which takes minutes first; auto: on cuda a U-Net's norms alone, half a minute"
    )
    checkpoint_steps: int = execution(500, "steps between checkpoints", ge=1)
    checkpoint_minutes: float = execution(5.0, "minutes after which there is a checkpoint in any case", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _as_the_objective_has_it(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return OBJECTIVES.get(str(given.get("objective")), {}) | given


class TrainScaleTable(Table):
    title: ClassVar[str] = "the network for rho, the norm of the delta (Eq. 10)"
    loss: Literal["log", "paper"] = identity("log", "log: squared error of log rho; paper: Eq. 10")
    width: int = identity(128, "hidden width", ge=1)
    lr: float = identity(1e-3, "learning rate", gt=0)
    batch_size: int = identity(128, "samples a step", ge=1)
    max_steps: int = extent(3000, "gradient steps, at most", ge=1)
    patience: int = identity(
        10, "evaluations in which the held-out loss falls by less than 1 % before stopping; 0: never stop early", ge=0
    )
    evaluate_steps: int = identity(100, "steps between evaluations on held-out samples", ge=1)
    held_out: float = identity(0.05, "part of the store kept for evaluation, at most 512 samples", gt=0, lt=1)
    checkpoint_steps: int = execution(500, "steps between checkpoints", ge=1)
    checkpoint_minutes: float = execution(5.0, "minutes after which there is a checkpoint in any case", gt=0)


class InferTable(Table):
    title: ClassVar[str] = "sampling deltas and predicting with them (Alg. 2)"
    ensemble: int = extent(5, "members: deltas sampled for each input", ge=1)
    sample_steps: int = identity(10, "steps of the sampler", ge=1)
    sampler: Literal["ddim", "ddpm"] = identity("ddim", "ddim is deterministic after its first noise")
    strength: Annotated[float, Field(ge=0)] | Auto = identity(
        1.0, "factor on the predicted rho; 1 is the paper, 0 is the base; auto: the one that evaluate fitted"
    )
    row: str = identity(
        "ocd ensemble",
        "row of evaluate to predict with, such as nearest k blended; auto: the one with the lowest validation loss",
    )
    save_deltas: bool = identity(False, "also write every sampled delta")
    pictures: int = identity(20, "strips written of at most so many inputs, where the task has picture(); 0: none", ge=0)
    batch_size: Count | Auto = execution("auto", "inputs at once, each with all its members")


# Literals, not constants of the module that computes them: settings are read without torch.
RequestedRow = Literal[
    "overfitted on test, all layers",
    "alternative layer",
    "deterministic hypernetwork",
    "ocd conditioned on x",
    "plain network on I(x)",
    "ocd by the paper's objective",
    "base trained for as long again",
    "deep ensemble",
]


class EvaluateTable(Table):
    title: ClassVar[str] = "comparing OCD with the base and with what a sceptic would try, on the labelled test split"
    samples: Count | Literal["all"] = identity("all", "test samples to compare on, in a seeded order")
    validation_samples: int = identity(2000, "validation samples to fit strengths and temperature on, at most", ge=2)
    strengths: list[Annotated[float, Field(ge=0)]] = identity(
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0], "strengths to choose from; 0 is the base", min_length=1
    )
    resamples: int = identity(2000, "bootstrap resamples for the 95 % intervals", ge=100)
    neighbours: int = identity(5, "k of the row nearest k blended", ge=1)
    memorisation_samples: int = identity(256, "test samples whose deltas are compared with all training deltas", ge=1)
    rows: list[RequestedRow] = identity([], "rows to add on request: each but the first takes a training")
    longer_base: bool = identity(
        True, "train the base for as long again, where that took less than a minute, or less time than the other stages"
    )
    seeds: int = identity(1, "whole trainings, with seeds from run.seed on, for mean ± standard deviation", ge=1)
    batch_size: Count | Auto = execution("auto", "samples at once")


class Settings(BaseModel):
    """The whole of `ocd.toml`: one table a stage, each optional but `task`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    run: RunTable = RunTable()
    task: TaskTable
    train_base: TrainBaseTable = Field(TrainBaseTable(), alias="train-base")
    select_layer: SelectLayerTable = Field(SelectLayerTable(), alias="select-layer")
    collect: CollectTable = CollectTable()
    train_diffusion: TrainDiffusionTable = Field(TrainDiffusionTable(), alias="train-diffusion")
    train_scale: TrainScaleTable = Field(TrainScaleTable(), alias="train-scale")
    evaluate: EvaluateTable = EvaluateTable()
    infer: InferTable = InferTable()

    def table(self, name: str) -> Table:
        """The table called `name` in `ocd.toml`."""
        return getattr(self, name.replace("-", "_"))


def tables() -> dict[str, type[Table]]:
    """Every table's class by its name in `ocd.toml`, in the order of the pipeline."""
    return {info.alias or name: info.annotation for name, info in Settings.model_fields.items()}
