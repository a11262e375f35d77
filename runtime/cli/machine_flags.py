"""What computes: flags of every command that runs graphs."""
import argparse

from ..backends import BACKENDS
from ..machine import Machine
from .values import whole


def add_machine_flags(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --backend, --device, --precision, --threads and --low-memory."""
    group.add_argument("--backend", default="ort", metavar="NAME",
                       help=f"what runs the graphs: {', '.join(BACKENDS)} (default: ort)")
    group.add_argument("--device", metavar="NAME", help="where: cpu, gpu, npu, auto or all, of what 'caphuman doctor' "
                       "lists for the backend (default: cpu, with coreml all)")
    group.add_argument("--precision", metavar="P", help="arithmetic: f32, bf16, f16, or with openvino fast (default: "
                       "f32 where the device can, fast for int8 graphs, with coreml what the bundle was built for)")
    group.add_argument("--threads", type=whole(1, 1024), metavar="N", help="at most so many cores (default: all)")
    group.add_argument("--low-memory", action="store_true", help="hold one stage at a time, CapFace and UNet apart "
                       "where the bundle has them so: the same portrait, slower, as graphs load again and again")


def chosen_machine(args: argparse.Namespace) -> Machine:
    """What the flags say; nothing is checked or loaded."""
    return Machine(args.backend, args.device, args.threads, args.precision,
                   memory="stage" if args.low_memory else "keep")
