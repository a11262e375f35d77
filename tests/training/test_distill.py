"""Consistency distillation: its pieces against the runtime's samplers, its fixed point on a toy, and whole runs."""
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from caphuman_edge.export import nano as export
from caphuman_edge.export.nano import schedule_of
from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.caphuman import CapHuman, FaceCondition
from caphuman_edge.ref.training import distill
from caphuman_edge.ref.training.critic import Critic, unlikeness
from caphuman_edge.ref.training.distill import Consistency, Distiller, Lesson, boundary, solver_timesteps
from caphuman_edge.ref.training.labels import Labels
from caphuman_edge.ref.training.run import Plan, Run
from caphuman_edge.ref.training.weights import load_nano, read_metadata, read_weights, write_weights
from caphuman_edge.runtime.contract import NANO
from caphuman_edge.runtime.denoise import Conditions, Denoiser
from caphuman_edge.runtime.errors import BadInput, CheckpointError
from caphuman_edge.runtime.manifest import Manifest, parse
from caphuman_edge.runtime.samplers import lay_out, lcm_step, sample, take, tcd_step
from caphuman_edge.runtime.schedule import Schedule, ddim_step, ddim_steps

CPU = torch.device("cpu")
MICRO = dataclasses.replace(
    NANO, height=128, width=128,
    unet=dataclasses.replace(NANO.unet, model_channels=8, channel_mult=(1, 1, 1, 1), norm_groups=2, context_width=16,
                             hint_widths=(4, 4, 4, 4)),
    text=dataclasses.replace(NANO.text, width=16, layers=1), vae=dataclasses.replace(NANO.vae, latent_scale=0.25),
    vision=dataclasses.replace(NANO.vision, width=16, layers=1, image_size=24))
NAMES = np.array(["00300", "00300_a", "00301", "00302"])
EMPTY = np.full(77, 49407)
FROZEN = ("id_linear.", "img_linear.", "cond_stage_model.", "control_cond_stage_model.",
          "control_model.input_hint_block.", "control_model.mask_predict.")
FACTS = {"kind": "lcm", "guidance": 4.0, "identity_guidance": 1.0, "solver_steps": 50, "teacher_samples": 1000,
         "teacher_steps": 10}
TRAILING = Schedule(timesteps="trailing")  # its 50 steps are the solver's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A label folder of noise that fits the micro model."""
    path, rng, count = tmp_path_factory.mktemp("labels"), np.random.default_rng(0), len(NAMES)
    jpeg = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(24, 24, 3), dtype=np.uint8)).save(jpeg, "JPEG")
    identities = rng.normal(size=(count, NANO.identity_width))
    np.savez(path / "labels.npz", names=NAMES, masks=np.packbits(rng.random((count, 16, 16)) > 0.5, axis=-1),
             identities=(identities / np.linalg.norm(identities, axis=1, keepdims=True)).astype(np.float16),
             empty_caption=EMPTY.astype(np.uint16), crops=np.frombuffer(jpeg.getvalue() * count, np.uint8),
             crop_ends=len(jpeg.getvalue()) * np.arange(1, count + 1))
    np.savez(path / "latents-128.npz", names=NAMES, step=np.float32(0.05), mirrored=np.zeros((count, 1), bool),
             config=json.dumps(dataclasses.asdict(MICRO.vae)),
             captions=rng.integers(1000, size=(count, 1, 1, 77)).astype(np.uint16),
             latents=rng.integers(-60, 60, size=(count, 1, 4, 16, 16), dtype=np.int8))
    np.save(path / "maps.npy", rng.normal(size=(count, 9, 128, 128)).astype(np.float16))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run's folder. No layer is zero, so that person, head and prompt all change what the model predicts."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = CapHuman(MICRO, autoencoder=False)
    for weight in model.parameters():
        if not weight.abs().max():
            nn.init.normal_(weight, std=0.1)
    write_weights(path, model.state_dict(), {"config": MICRO.to_json(), "step": 10, "samples": 1000})
    return path


@pytest.fixture
def train(folder, teacher, monkeypatch):
    """Runs the command for some steps, in place of its minutes."""
    def command(out, steps, *flags):
        def few(run, loss_of):
            for _ in range(steps):
                terms = loss_of(run.step)
                assert all(torch.isfinite(term) for term in terms.values())
                run.update(terms["loss"])
            run.save()

        monkeypatch.setattr(Run, "train", few)
        monkeypatch.setattr("sys.argv", ["distill", "--labels", str(folder), "--teacher", str(teacher), "--out",
                                         str(out), "--edge", "128", "--minutes", "1", "--batch", "2", *flags])
        distill.main()
        return read_metadata(out)
    return command


@pytest.fixture
def batch(folder):
    return Labels(folder, 128).batch(2, np.random.default_rng(0), 0.0)


def distiller(folder, lesson, consistency=None, critic=None):
    """A teacher's folder's distiller, with a student that differs from the target."""
    teacher = distill.load_teacher(folder, MICRO.vae)
    student, target = distill.student_of(teacher), copy.deepcopy(teacher)
    with torch.no_grad():
        student.unet.out[2].bias += 0.1
    return Distiller(lesson, teacher, student, target, torch.from_numpy(EMPTY), consistency or Consistency("lcm", 50),
                     critic)


# what the student is compared by, against the numpy samplers that it will be run with


def test_the_solvers_table_is_what_the_runtime_walks_from_the_last_step_on():
    table = solver_timesteps(50)
    assert table[1:].flip(0).tolist() == [step.timestep for step in ddim_steps(TRAILING, 50)] and table[0] == 0
    picked = {step.timestep for kind in ("lcm", "tcd") for count in (1, 2, 4)
              for step in lay_out(Schedule(kind=kind, timesteps="trailing"), count)}
    assert picked <= set(table.tolist())


@pytest.mark.parametrize("steps", [0, 30, 2000])
def test_tables_that_do_not_divide_the_schedule_are_refused(steps):
    with pytest.raises(BadInput, match=f"steps is {steps}, expected a divisor of 1000"):
        solver_timesteps(steps)


@pytest.mark.parametrize("skip", [0, 51])
def test_a_leap_longer_than_the_table_is_refused(skip):
    with pytest.raises(BadInput, match=f"skip is {skip}, expected 1 to 50"):
        Consistency("lcm", 50, skip)


@pytest.mark.parametrize("kind", ["lcm", "tcd"])
def test_the_consistency_function_is_the_identity_at_its_end(kind):
    """Whatever eps says: of LCM at timestep 0, of TCD wherever it is to end."""
    latents, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    end = torch.tensor([0, 0, 0] if kind == "lcm" else [0, 499, 979])
    agree = Consistency(kind, 50).agree
    assert torch.allclose(agree(latents, eps, end, end), latents, atol=1e-5)
    assert not torch.allclose(agree(latents, eps, end + 20, end), latents, atol=0.01)


def test_boundary_scalings_are_those_of_the_sampler():
    steps = lay_out(Schedule(kind="lcm", timesteps="trailing"), 50)
    skip, out = boundary(torch.tensor([step.timestep for step in steps]))
    assert np.allclose(skip.ravel(), [step.skip for step in steps], rtol=1e-5, atol=1e-9)
    assert np.allclose(out.ravel(), [step.out for step in steps], rtol=1e-5)
    assert [float(scaling) for scaling in boundary(torch.zeros(1))] == [1, 0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_lcm_function_is_the_samplers_clean_latent(count):
    latent, eps = np.random.default_rng(0).normal(size=(2, 1, 4, 8, 8)).astype(np.float32)
    for step in lay_out(Schedule(kind="lcm", timesteps="trailing"), count):
        _, clean = lcm_step(latent, eps, step)
        given = Consistency("lcm", 50).agree(*map(torch.from_numpy, (latent, eps)), torch.tensor([step.timestep]), None)
        assert np.allclose(given, clean, rtol=1e-5, atol=1e-5)


def test_the_tcd_function_is_the_samplers_way_down():
    """With gamma 0 there is no way up again."""
    latent, eps = np.random.default_rng(0).normal(size=(2, 1, 4, 8, 8)).astype(np.float32)
    steps = lay_out(Schedule(kind="tcd", timesteps="trailing"), 4)
    for step, end in zip(steps, [*(step.timestep for step in steps[1:]), 0], strict=True):
        lower, _ = tcd_step(latent, eps, step)
        given = Consistency("tcd", 50).agree(*map(torch.from_numpy, (latent, eps)), torch.tensor([step.timestep]),
                                             torch.tensor([end]))
        assert np.allclose(given, lower, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lcm", "tcd"])
@pytest.mark.parametrize("skip", [1, 5])
def test_student_and_target_are_asked_about_ends_of_one_step_of_the_teacher(kind, skip):
    asked = {}

    def ask(who, value):
        def denoise(latents, timestep):
            asked[who] = latents, timestep
            return torch.full_like(latents, value)
        return denoise

    torch.manual_seed(0)
    consistency = Consistency(kind, 50, skip)
    compared = consistency.compare(ask("student", 1), ask("teacher", 2), ask("target", 3), torch.randn(256, 4, 2, 2))
    (noisy, here), (seen, same), (quieter, there) = (asked[who] for who in ("student", "teacher", "target"))
    table = solver_timesteps(50).tolist()
    leaps = [table.index(int(a)) - table.index(int(b)) for a, b in zip(here, there, strict=True)]
    assert torch.equal(noisy, seen) and torch.equal(here, same) and len(here.unique()) > 30
    assert all(leap == min(skip, table.index(int(a))) for leap, a in zip(leaps, here, strict=True))
    assert torch.equal(quieter, consistency.step(noisy, torch.full_like(noisy, 2), here, there))
    last = there == 0
    assert last.any() and torch.allclose(compared.wanted[last], quieter[last], atol=1e-5)  # whatever the target says


# the teacher


@pytest.mark.parametrize(("guidance", "identity_guidance", "predictions"),
                         [(3.0, 3.0, 3), (3.0, 1.0, 2), (7.5, 2.0, 3), (1.0, 1.0, 1)])
def test_the_teachers_step_is_the_runtimes_guided_ddim_step(teacher, batch, guidance, identity_guidance, predictions):
    lesson = Lesson(guidance=guidance, identity_guidance=identity_guidance)
    made = distiller(teacher, lesson)
    text, face = made.conditions(batch)
    consistency, noisy = Consistency("lcm", 50), torch.randn_like(batch.latents)
    assert len(lesson.branches) == predictions
    for step, end in list(zip(ddim_steps(TRAILING, 50), [*solver_timesteps(50)[1:-1].flip(0), 0], strict=True))[::16]:
        timestep = torch.full((2,), step.timestep)
        eps = made.guided(noisy, timestep, text, face)
        ours = consistency.step(noisy, eps, timestep, torch.full((2,), int(end)))
        for row in range(2):
            latent = noisy[row:row + 1].numpy()
            guided = Denoiser(lambda _: graph_of(made.teacher), fused=True).eps(
                latent, step.timestep, conditions_of(made, text, face, row, guidance, identity_guidance))
            expected, _ = ddim_step(latent, guided, step)
            assert np.allclose(ours[row], expected[0], rtol=1e-3, atol=1e-3)


def test_guidance_changes_what_the_teacher_says(teacher, batch):
    made = [distiller(teacher, Lesson(guidance=g, identity_guidance=i)) for g, i in ((1, 1), (3, 1), (3, 3), (1, 3))]
    timestep, noisy = torch.tensor([999, 499]), torch.randn_like(batch.latents)
    text, face = made[0].conditions(batch)
    said = [each.guided(noisy, timestep, text, face) for each in made]
    assert min(float((a - b).abs().max()) for k, a in enumerate(said) for b in said[:k]) > 1e-3


def graph_of(model):
    """The torch model under the runtime's names."""
    def denoiser(arrays):
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        gates = tuple(tensors[f"gate_{level}"] for level in range(4))
        face = FaceCondition(tensors["face_tokens"], tensors["hint"], gates)
        rows = len(tensors["text_tokens"])
        with torch.no_grad():
            return {"eps": torch.cat([model(tensors["latent"], tensors["timestep"], tensors["text_tokens"][k:k + 1],
                                            [face]) for k in range(rows)]).numpy()}
    return denoiser


def conditions_of(made, text, face, row, guidance, identity_guidance):
    one = slice(row, row + 1)
    person = {"hint": face.hint[one].numpy(), "face_tokens": face.tokens[one].numpy(),
              **{f"gate_{level}": gate[one].numpy() for level, gate in enumerate(face.gates)}}
    texts = [made.negative, text[one]] if guidance != 1 else [text[one]]
    return Conditions(torch.cat(texts).numpy(), [person], np.ones(13, np.float32), guidance, identity_guidance)


def test_frozen_parts_see_what_the_teacher_was_trained_with(teacher, batch):
    made = distiller(teacher, Lesson())
    text, face = made.conditions(batch)
    assert torch.equal(text, made.teacher.text_encoder(batch.captions))
    assert face.tokens.shape == (2, MICRO.face_tokens, 16) and not face.hint.requires_grad
    assert torch.equal(made.negative, made.teacher.text_encoder(torch.from_numpy(EMPTY)[None]))


# the fixed point


class Line(nn.Module):
    """eps by a factor a timestep, as a v prediction; starts as the exact denoiser of N(0, SPREAD^2)."""

    SPREAD = 2.0

    def __init__(self):
        super().__init__()
        self.register_buffer("alphas", Consistency("lcm", 50).alphas)
        roots = self.alphas.sqrt() * (1 - self.alphas).sqrt()
        self.factors = nn.Parameter(roots * (1 - self.SPREAD**2) / (self.alphas * self.SPREAD**2 + 1 - self.alphas))

    def forward(self, latents, timestep):
        share = self.alphas[timestep].view(-1, 1, 1, 1)
        return share.sqrt() * self.factors[timestep].view(-1, 1, 1, 1) * latents + (1 - share).sqrt() * latents


@pytest.mark.parametrize(("kind", "left"), [("lcm", 0.01), ("tcd", 0.3)])
def test_the_loss_ends_at_the_end_of_the_teachers_trajectory(kind, left, tmp_path):
    """On Gaussian data, whose exact denoiser is known, one step of the student becomes all ten of the teacher.

    A student of TCD has one prediction a timestep for every end, and no such prediction is right for all of them.
    """
    torch.manual_seed(0)
    teacher, student, consistency = Line(), Line(), Consistency(kind, 10)
    run = Run(tmp_path, student, Plan(minutes=1, warmup=1, decay_steps=300, ema=0.8), {},
              [torch.optim.SGD(student.parameters(), 4.0)])
    start = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    *_, (end, _) = sample(as_numpy(teacher), start, ddim_steps(TRAILING, 10), lambda _: start)
    before = one_step_error(student, kind, start, end)
    for _ in range(300):
        latents = Line.SPREAD * torch.randn(256, 1, 1, 1)
        given, wanted, _ = consistency.compare(student, teacher, run.average.module, latents)
        run.update(distill.cost(given - wanted).mean())
    assert before > 1 and one_step_error(run.average.module, kind, start, end) < left * before


def one_step_error(student, kind, start, end):
    step, = lay_out(Schedule(kind=kind, timesteps="trailing"), 1)
    made, _ = take(step, start, as_numpy(student)(start, step.timestep))
    return float(np.sqrt(np.square(made - end).mean()))


def as_numpy(model):
    def denoise(latent, timestep):
        with torch.no_grad():
            return model(torch.from_numpy(latent), torch.tensor([timestep])).numpy()
    return denoise


# the loss on a batch


def test_a_student_that_agrees_has_no_loss_and_one_that_does_not_has(teacher, batch):
    made = distiller(teacher, Lesson())
    made.consistency.compare = lambda *_: distill.Compared(batch.latents, batch.latents, batch.latents)
    agreed = made.losses(batch)
    made.consistency.compare = lambda *_: distill.Compared(batch.latents + 1, batch.latents, batch.latents)
    apart = made.losses(batch)
    assert float(agreed["loss"]) == 0 and float(apart["distance"]) == pytest.approx(1)
    weight = 1 + distill.FACE_WEIGHT * float(batch.masks.mean())
    assert float(apart["loss"]) == pytest.approx(weight * (1 - distill.HUBER), rel=1e-3)


def test_only_the_student_gets_gradients_and_only_where_it_is_trained(teacher, batch):
    made = distiller(teacher, Lesson())
    made.losses(batch)["loss"].backward()
    reached = {name for name, weight in made.student.named_parameters()
               if weight.grad is not None and weight.grad.abs().max() > 0}
    assert {name.split(".")[0] for name in reached} == {"model", "control_model"}
    assert not any(name.startswith(FROZEN) for name in reached)
    assert all(weight.grad is None for model in (made.teacher, made.target) for weight in model.parameters())


def test_the_loss_rises_where_the_student_turns_away_from_the_target(teacher, batch):
    made = distiller(teacher, Lesson(guidance=1, identity_guidance=1), Consistency("lcm", 50))

    def loss():
        torch.manual_seed(3)
        return float(made.losses(batch)["loss"].detach())

    near = loss()
    with torch.no_grad():
        made.student.unet.out[2].bias += 1
    assert loss() > 2 * near


def test_a_critic_adds_its_judgement_of_what_the_student_sees(teacher, batch):
    critic = Critic(16).eval().requires_grad_(False)
    torch.manual_seed(3)
    plain = distiller(teacher, Lesson()).losses(batch)
    torch.manual_seed(3)
    judged = distiller(teacher, Lesson(), critic=critic).losses(batch)
    assert "identity" not in plain and torch.equal(plain["distance"], judged["distance"])
    added = float((judged["loss"] - plain["loss"]).detach())
    assert added == pytest.approx(distill.IDENTITY_WEIGHT * float(judged["identity"].detach()), rel=1e-2)
    made = distiller(teacher, Lesson(), critic=critic)
    made.consistency.compare = lambda *_: distill.Compared(batch.latents, batch.latents, batch.latents)
    expected = unlikeness(critic, batch.latents, batch.identities)
    assert float(made.losses(batch)["identity"]) == pytest.approx(float(expected), rel=1e-5)


# runs


@pytest.mark.parametrize("kind", ["lcm", "tcd"])
def test_a_run_goes_on_where_it_stopped_and_keeps_frozen_parts_bit_identical(train, teacher, tmp_path, kind):
    assert train(tmp_path, 2, "--kind", kind)["step"] == 2
    first = read_weights(tmp_path)
    facts = train(tmp_path, 1, "--kind", kind)
    before, after = read_weights(teacher), read_weights(tmp_path)
    assert (facts["step"], facts["samples"]) == (3, 1000 + 3 * 2)
    assert facts["distilled"] == {**FACTS, "kind": kind}
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) or not name.startswith(FROZEN), name
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("model.diffusion_model.") for name in moved)
    assert any(name.startswith("control_model.input_blocks.") for name in moved)
    assert any(not torch.equal(first[name], after[name]) for name in moved)


def test_the_command_trains_by_the_clock(folder, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill", "--labels", str(folder), "--teacher", str(teacher), "--out",
                                     str(tmp_path), "--edge", "128", "--minutes", "0.02", "--batch", "1"])
    distill.main()
    assert read_metadata(tmp_path)["step"] > 0 and (tmp_path / "state.pt").exists()


def test_a_stopped_run_has_kept_its_target(train, tmp_path):
    train(tmp_path, 2)
    kept = torch.load(tmp_path / "state.pt")["average"]
    train(tmp_path, 0)
    state = torch.load(tmp_path / "state.pt")
    assert same(state["average"], kept)
    name = "model.diffusion_model.out.2.weight"
    assert not torch.equal(kept[f"module.{name}"], state["model"][name])


def same(weights, others):
    return all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_the_student_starts_as_the_teacher_or_as_another_student(train, teacher, tmp_path):
    train(tmp_path / "untrained", 0)
    train(tmp_path / "small", 2, "--skip", "5")
    facts = train(tmp_path / "large", 0, "--start-from", str(tmp_path / "small"))
    assert same(read_weights(tmp_path / "untrained"), read_weights(teacher))
    assert same(read_weights(tmp_path / "large"), read_weights(tmp_path / "small"))
    assert not same(read_weights(tmp_path / "small"), read_weights(teacher))
    assert facts["samples"] == 1000 + 2 * 2 and facts["distilled"]["teacher_samples"] == 1000


@pytest.mark.parametrize("flags", [("--kind", "tcd"), ("--guidance", "5"), ("--steps", "25")])
def test_a_run_of_another_lesson_is_not_gone_on_with(train, tmp_path, flags):
    train(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"holds weights distilled by .*give that run's options or another --out"):
        train(tmp_path, 1, *flags)


def test_the_teachers_own_folder_is_not_written_to(train, teacher):
    with pytest.raises(CheckpointError, match="holds weights distilled by None"):
        train(teacher, 1)


def test_a_student_is_no_teacher(train, tmp_path):
    train(tmp_path, 0)
    with pytest.raises(CheckpointError, match="holds a student that needs no guidance, expected the teacher"):
        distill.load_teacher(tmp_path, MICRO.vae)


def test_a_teacher_of_another_autoencoder_is_refused(teacher):
    with pytest.raises(CheckpointError, match=r"latents of .*latent_scale=0\.25.*latent_scale=0\.5"):
        distill.load_teacher(teacher, dataclasses.replace(MICRO.vae, latent_scale=0.5))


@pytest.mark.parametrize("decay", ["1", "-0.1", "nan"])
def test_a_target_that_never_follows_is_refused(train, tmp_path, decay):
    with pytest.raises(BadInput, match=r"target-decay is .*, expected 0 to below 1"):
        train(tmp_path, 1, "--target-decay", decay)


# export


@pytest.mark.parametrize("kind", ["lcm", "tcd"])
def test_a_students_bundle_is_sampled_in_four_unguided_steps(train, tmp_path, kind):
    schedule = schedule_of(train(tmp_path, 0, "--kind", kind), "run")
    assert schedule == Schedule(kind=kind, steps=4, guidance=1.0, identity_guidance=1.0, timesteps="trailing")
    assert len(lay_out(schedule, schedule.steps)) == 4
    assert parse(Manifest("nano", MICRO, schedule, {}).to_text()).schedule == schedule


def test_a_teachers_bundle_is_guided_as_before(teacher):
    schedule = schedule_of(read_metadata(teacher), "run")
    assert schedule == export.SAMPLED
    assert schedule.guidance > 1 and schedule.steps > 4


@pytest.mark.parametrize("distilled", [{"kind": "ddim"}, {}, "lcm please", None])
def test_weights_distilled_for_an_unknown_sampler_are_refused(distilled):
    with pytest.raises(CheckpointError, match="run is distilled for .*, expected lcm or tcd"):
        schedule_of({"distilled": distilled}, "run")


def test_a_student_is_read_as_any_miniature(train, tmp_path):
    train(tmp_path / "run", 1)
    vae = Autoencoder(MICRO.vae)
    (tmp_path / "vae").mkdir()
    write_weights(tmp_path / "vae", vae.state_dict(), {"vae": dataclasses.asdict(MICRO.vae)})
    model = load_nano(tmp_path / "run", tmp_path / "vae")
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.state_dict()[name], read_weights(tmp_path / "run")[name])
