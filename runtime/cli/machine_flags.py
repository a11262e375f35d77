"""What computes: flags of every command that runs graphs."""
import argparse

from ..backends import BACKENDS
from ..machine import Machine
from .values import whole


def add_machine_flags(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --backend, --device, --precision and --threads."""
    group.add_argument("--backend", default="ort", metavar="NAME",
                       help=f"what runs the graphs: {', '.join(BACKENDS)} (default: ort)")
    group.add_argument("--device", metavar="NAME", help="where: cpu, gpu, npu, auto or all, of what 'caphuman doctor' "
                       "lists for the backend (default: cpu, with coreml all)")
    group.add_argument("--precision", metavar="P", help="arithmetic: f32, bf16 or f16 (default: f32 where the device "
                       "can, with coreml what the bundle was built for)")
    group.add_argument("--threads", type=whole(1, 1024), metavar="N", help="at most so many cores (default: all)")


def chosen_machine(args: argparse.Namespace) -> Machine:
    """What the flags say; nothing is checked or loaded."""
    return Machine(args.backend, args.device, args.threads, args.precision)
