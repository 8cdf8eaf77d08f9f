"""The stages in order: what is done, what is stale, what to run next. Config objects stop here."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae_transfer.analysis.cross_eval import cross_evaluate
from sae_transfer.analysis.metrics import BOOTSTRAP_SEED
from sae_transfer.config import ExternalSAE, SAESpec, Study, require_saes, study_hash
from sae_transfer.errors import StudyError
from sae_transfer.models.pair import Checkpoint, check_agreement, fingerprint, load_model, load_tokenizer, resolve
from sae_transfer.models.splice import open_splicer, parse_hook
from sae_transfer.models.tokens import TokenSet, build_token_set, load_token_set
from sae_transfer.progress import Meter
from sae_transfer.report.tables import write_cross_eval_tables
from sae_transfer.saes.store import StoredSAE, check_fits, load_external, load_own
from sae_transfer.saes.stream import ActivationStream, measure_norm_scale
from sae_transfer.saes.training import Schedule, Trainee, new_sae, train_saes
from sae_transfer.study import RunDirectory, file_digest, write_json

logger = logging.getLogger(__name__)

STAGES = ("tokens", "train", "cross-eval", "report")


def run_stages(study: Study, root: Path, stages: Sequence[str], *, force: bool = False) -> Path:
    """Carry out stages of a study, those before them that they need included.

    Args:
        study: The study.
        root: Its run directory.
        stages: Of `STAGES`, in that order.
        force: Redo a stage whose inputs changed; and the one stage asked for, when it is one, in any case.

    Returns:
        The path that a reader should open.

    Raises:
        StudyError: Something that the user can mend; finished stages stay finished.
    """
    # Torch takes all cores it sees, also those that a job was not given.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    device = choose_device(study.compute.device)
    checkpoints, notes = resolve_pair(study)
    fingerprints = {side: fingerprint(checkpoint) for side, checkpoint in checkpoints.items()}
    identity = {f"{side} model": value for side, value in fingerprints.items()} | {"site": study.site.hook_name}
    revisions = {f"{side}_revision": checkpoint.revision for side, checkpoint in checkpoints.items()}
    study = study.model_copy(update={"pair": study.pair.model_copy(update=revisions)})
    with RunDirectory.open(root, study, identity) as run:
        run.update_manifest(pair_differences=notes)
        redo = stages[0] if force and len(stages) == 1 else None
        pipeline = _Pipeline(study, run, checkpoints, fingerprints, device, force=force, redo=redo)
        for stage in stages:
            getattr(pipeline, stage.replace("-", "_"))()
    return root / "report" / "tables" / "cross_eval.md" if "report" in stages else root


class _Pipeline:
    """The stages of one study in one run directory; what several of them need is looked up once."""

    def __init__(
        self,
        study: Study,
        run: RunDirectory,
        checkpoints: dict[str, Checkpoint],
        fingerprints: dict[str, str],
        device: str,
        *,
        force: bool,
        redo: str | None,
    ) -> None:
        self._study, self._run, self._force, self._redo = study, run, force, redo
        self._checkpoints, self._fingerprints, self._device = checkpoints, fingerprints, device
        on_gpu = self._device.startswith("cuda")
        asked = study.pair.dtype
        self._training_dtype = ("bfloat16" if on_gpu else "float32") if asked == "auto" else asked
        self._evaluation_dtype = "float32" if asked == "auto" else asked
        self._autocast = study.compute.autocast == "bfloat16" or (study.compute.autocast == "auto" and on_gpu)

    # ---- stages -------------------------------------------------------------------------------------------------

    def tokens(self) -> None:
        """Make the token set."""
        study = self._study

        def work() -> None:
            settings = study.tokens
            meter: Meter | None = None

            def progress(done: int, wanted: int) -> None:
                nonlocal meter
                meter = meter or Meter("tokens", wanted, "sequences")
                meter.update(done)

            build_token_set(
                self._run.root / "tokens",
                load_tokenizer(self._checkpoints["base"]),
                **settings.model_dump(),
                n_evaluation_tokens=study.evaluate.tokens,
                n_training_tokens=study.n_training_tokens,
                vocab_size=min(c.config["vocab_size"] for c in self._checkpoints.values()),
                progress=progress,
            )

        self._stage("tokens", self._token_inputs(), work)

    def train(self) -> None:
        """Train the SAEs of each model asked for."""
        if self._study.saes is None:
            logger.info("train: the study trains no SAEs, nothing to do")
            return
        for side in self._study.train.models:
            self._train_side(side)

    def _train_side(self, side: str) -> None:
        study, train = self._study, self._study.train
        scale = self._norm_scales()[side]
        specs = study.sae_specs()
        inputs = {
            **self._inputs(side),
            "saes": [[spec.name, spec.options] for spec in specs],
            "train": train.model_dump(mode="json", exclude={"models", "scale_tokens"}),
            "norm scale": scale,
            "dtype": [self._training_dtype, self._autocast],
        }

        def work() -> None:
            checkpoint, token_set = self._checkpoints[side], self._token_set
            model = load_model(checkpoint, dtype=self._training_dtype, device=self._device)
            n_batches = train.tokens // train.batch_size
            stream = ActivationStream(
                open_splicer(model, study.site.hook_name, checkpoint),
                token_set.training,
                d_model=checkpoint.d_model,
                norm_scale=scale,
                batch_size=train.batch_size,
                n_batches=n_batches,
                seed=study.tokens.seed,
                drop_norm_above=train.drop_norm_above,
                device=self._device,
            )
            warmup = round(train.l1_warmup * n_batches)
            trainees = [self._trainee(side, spec, warmup) for spec in specs]
            schedule = Schedule(train.lr, lr_warmup=0.0, lr_decay=train.lr_decay)
            train_saes(
                trainees,
                stream,
                schedule,
                norm_scale=scale,
                autocast=self._autocast,
                device=self._device,
                label=f"train {side}",
            )

        self._stage(f"train-{side}", inputs, work, verb="train")

    def cross_eval(self) -> None:
        """Evaluate every SAE on both models."""
        study, evaluate = self._study, self._study.evaluate
        require_saes(study)
        own = self._own_directories()
        external = {sae.name: self._external_directory(sae) for sae in study.external_saes}
        scales = None if study.saes is None and study.norm_scale is None else self._norm_scales()
        inputs = {
            **self._inputs("base"),
            **self._inputs("chat"),
            "evaluate": evaluate.model_dump(mode="json", exclude={"tokens"}),
            "norm scales": scales,
            "dtype": self._evaluation_dtype,
            "SAEs": {path.name: file_digest(path / "sae_weights.safetensors") for path in own},
            "external SAEs": {
                sae.name: [sae.trained_on, sae.scale, _digest_if_there(external[sae.name])]
                for sae in study.external_saes
            },
        }

        def load_saes(norm_scales: Mapping[str, float]) -> list[StoredSAE]:
            d_model = self._checkpoints["base"].d_model
            saes = [load_own(path, self._device) for path in own]
            for sae, path in zip(saes, own, strict=True):
                check_fits(sae, d_model, study.site.hook_name, path, accept_mismatch=False)
            for asked in study.external_saes:
                path = external[asked.name]
                scale = norm_scales[asked.trained_on]
                sae = load_external(asked.name, asked.trained_on, path, asked.scale, scale, self._device)
                check_fits(sae, d_model, study.site.hook_name, path, accept_mismatch=asked.accept_mismatch)
                saes.append(sae)
            return saes

        def work() -> None:
            measured = cross_evaluate(
                self._run.root / "cross_eval",
                self._checkpoints,
                self._token_set,
                load_saes,
                hook_name=study.site.hook_name,
                norm_scales=scales,
                outlier_threshold=evaluate.outlier_threshold,
                outlier_policies=evaluate.outliers,
                scale_policies=evaluate.scale,
                averaging=evaluate.averaging,
                batch_size=evaluate.batch_size,
                dtype=self._evaluation_dtype,
                device=self._device,
            )
            if scales is None:
                self._write_scales(measured, "the evaluation tokens")

        self._stage("cross-eval", inputs, work)

    def report(self) -> None:
        """Write the tables; cheap, so done whenever asked."""
        write_cross_eval_tables(self._run.root)

    # ---- what stages need -----------------------------------------------------------------------------------------

    def _stage(self, name: str, inputs: Mapping[str, Any], work: Callable[[], None], verb: str | None = None) -> None:
        changed = self._run.changed_inputs(name, inputs)
        if changed == [] and self._redo != (verb or name):
            logger.info("%s: done already, nothing to do", name)
            return
        if changed and not self._force:
            raise StudyError(
                f"{name}: was done in {self._run.root} with other inputs; changed since: {', '.join(changed)}",
                "--force to do it again there, or --out DIR to keep both",
            )
        self._run.forget(name)
        started = time.monotonic()
        work()
        seconds = time.monotonic() - started
        self._run.finish(name, inputs, seconds)
        self._run.update_manifest(**self._provenance())
        logger.info("%s: done in %.0f s", name, seconds)

    @cached_property
    def _token_set(self) -> TokenSet:
        if self._run.changed_inputs("tokens", self._token_inputs()) != []:
            self.tokens()
        return load_token_set(self._run.root / "tokens")

    def _token_inputs(self) -> dict[str, Any]:
        return {
            "tokens": self._study.tokens.model_dump(mode="json"),
            "evaluate.tokens": self._study.evaluate.tokens,
            "training tokens": self._study.n_training_tokens,
            "tokenizer of the base model": fingerprint_of_tokenizer(self._checkpoints["base"]),
        }

    def _inputs(self, side: str) -> dict[str, Any]:
        return {
            "token set": self._token_set.fingerprint,
            f"{side} model": self._fingerprints[side],
            "site": self._study.site.hook_name,
        }

    def _norm_scales(self) -> dict[str, float]:
        """c_m of both models: given, or measured once on the first training tokens and kept in scales.json."""
        study, given = self._study, self._study.norm_scale
        path = self._run.root / "scales.json"
        n_tokens = min(study.train.scale_tokens, study.train.tokens)
        inputs = {
            **self._inputs("base"),
            **self._inputs("chat"),
            "norm_scale": given.model_dump() if given else None,
            "train.scale_tokens": n_tokens,
            "dtype": self._training_dtype,
        }

        def work() -> None:
            if given is not None:
                self._write_scales(given.model_dump(), "the study file")
                return
            scales = {}
            sequences = self._token_set.training[: -(-n_tokens // self._token_set.context_size)]
            for side, checkpoint in self._checkpoints.items():
                logger.info("norm scale of %s: measuring on %s tokens", side, f"{sequences.size:,}")
                model = load_model(checkpoint, dtype=self._training_dtype, device=self._device)
                splicer = open_splicer(model, study.site.hook_name, checkpoint)
                scales[side] = measure_norm_scale(splicer, sequences, checkpoint.d_model, self._device)
            self._write_scales(scales, f"the first {sequences.size} training tokens")

        if self._run.changed_inputs("scales", inputs) != []:
            self._stage("scales", inputs, work)
        return {side: json.loads(path.read_text())[side] for side in ("base", "chat")}

    def _write_scales(self, scales: Mapping[str, float], source: str) -> None:
        write_json(self._run.root / "scales.json", {**scales, "measured_on": source})

    def _trainee(self, side: str, spec: SAESpec, sparsity_warmup_steps: int) -> Trainee:
        study = self._study
        sae = new_sae(
            spec.architecture,
            d_in=self._checkpoints[side].d_model,
            d_sae=spec.d_sae,
            sparsity_key=spec.sparsity_key,
            sparsity_value=spec.sparsity_value,
            seed=spec.seed,
            sparsity_warmup_steps=sparsity_warmup_steps,
            options=spec.options,
            metadata={
                "model_name": getattr(study.pair, side),
                "hook_name": study.site.hook_name,
                "context_size": self._token_set.context_size,
                "prepend_bos": study.tokens.prepend_bos,
                "dataset_path": self._token_set.dataset,
            },
            device=self._device,
        )
        provenance = {
            "trained_on": side,
            "architecture": spec.architecture,
            "d_sae": spec.d_sae,
            "sparsity_key": spec.sparsity_key,
            "sparsity_value": spec.sparsity_value,
            "seed": spec.seed,
            "parent": None,
            "study_hash": self._study_hash(),
        }
        return Trainee(self._run.root / "saes" / f"{side}-{spec.name}", sae, provenance)

    def _own_directories(self) -> list[Path]:
        """The directories of the study's own SAEs, once all of them are trained."""
        study = self._study
        if study.saes is None:
            return []
        for side in study.train.models:
            if self._run.record(f"train-{side}") is None:
                raise StudyError(
                    f"{self._run.root}: the SAEs of the {side} model are not trained yet",
                    "sae-transfer train CONFIG, or sae-transfer run CONFIG for everything",
                )
        names = [f"{side}-{spec.name}" for side in study.train.models for spec in study.sae_specs()]
        return [self._run.root / "saes" / name for name in names]

    def _external_directory(self, sae: ExternalSAE) -> Path:
        if sae.path is None:
            raise StudyError(
                f"external_saes.{sae.name}: taking a SAELens release is not built yet", "give the directory: path: DIR"
            )
        return Path(sae.path)

    def _study_hash(self) -> str:
        return study_hash(self._study, {**self._fingerprints, "tokens": self._token_set.fingerprint})

    def _provenance(self) -> dict[str, Any]:
        return {
            "study_hash": self._study_hash(),
            "models": {
                side: {"source": c.source, "revision": c.revision, "class": c.model_class}
                for side, c in self._checkpoints.items()
            },
            "token_set": {
                "fingerprint": self._token_set.fingerprint,
                "dataset": self._token_set.dataset,
                "bos_token_id": self._token_set.bos_token_id,
            },
            "seeds": {
                "tokens": self._study.tokens.seed,
                "saes": sorted({spec.seed for spec in self._study.sae_specs()}),
                "bootstrap": BOOTSTRAP_SEED,
            },
            "device": torch.cuda.get_device_name() if self._device.startswith("cuda") else self._device,
        }


def resolve_pair(study: Study, *, weights: bool = True) -> tuple[dict[str, Checkpoint], list[str]]:
    """Find both models, and refuse a pair that does not agree or lacks the site's layer.

    Args:
        study: The study.
        weights: Whether the weights are wanted on disk too.

    Returns:
        `base` and `chat`, and the differences that leave activations comparable.

    Raises:
        StudyError: Something does not fit.
    """
    pair = study.pair
    checkpoints = {
        "base": resolve(pair.base, pair.base_revision, weights=weights),
        "chat": resolve(pair.chat, pair.chat_revision, weights=weights),
    }
    notes = check_agreement(checkpoints["base"], checkpoints["chat"])
    if notes:
        logger.warning("the two models differ in ways that leave activations comparable: %s", "; ".join(notes))
    parse_hook(study.site.hook_name, checkpoints["base"].n_layers)
    return checkpoints, notes


def choose_device(asked: str) -> str:
    """The torch device that `auto` means here, or the one asked for.

    Raises:
        StudyError: It is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return next(name for name, there in available.items() if there and name != "mps")
    kind, _, index = asked.partition(":")
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise StudyError(
            f"compute.device: {asked} is asked for, and this machine has no such device",
            "--device cpu, or --device auto",
        )
    return asked


def fingerprint_of_tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of the files that decide how text becomes ids."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
    return {name: file_digest(checkpoint.directory / name) for name in names if (checkpoint.directory / name).is_file()}


def _digest_if_there(directory: Path) -> str | None:
    weights = directory / "sae_weights.safetensors"
    return file_digest(weights) if weights.is_file() else None
