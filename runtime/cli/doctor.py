"""`caphuman doctor`: what this machine can do. Imports nothing at the top that could be missing."""
import argparse
import os
import platform
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any

from ..errors import CapHumanError
from .report import add_json_flag, show

DISTRIBUTION = "caphuman-edge"
REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*(?:;.*extra\s*==\s*["']([\w-]+)["'])?""")
NOT_FOR_USERS = {"dev"}  # extras that serve the development of this package


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("doctor", help="what this machine can do, and what is missing",
                                   description="Says what this machine can do, and what is missing.")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Report; a finding is no error, so the exit code is 0 whatever is missing."""
    show(survey(), args.json, text)
    return 0


def survey() -> dict[str, Any]:
    """Everything the command reports, ready for JSON."""
    return {
        "version": version(DISTRIBUTION),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: found(name) for name in packages().get("", [])},
        "cores": os.cpu_count(), "memory_gb": memory_gb(),
        "backends": backends(), "kernels": probed(kernels), "renderer": probed(renderer),
        "bundle": probed(embedded_bundle), "cache": probed(cache),
        "extras": {extra: {name: found(name) for name in names} for extra, names in packages().items()
                   if extra and extra not in NOT_FOR_USERS},
    }


def text(report: dict[str, Any]) -> str:
    """The survey for a person."""
    memory = "unknown" if report["memory_gb"] is None else f"{report['memory_gb']} GB"
    rows = {
        DISTRIBUTION: report["version"], "python": report["python"],
        **{name: found or f"missing: pip install {name}" for name, found in report["packages"].items()},
        "cores": f"{report['cores']}, memory {memory}",
        **{f"--backend {name}": found for name, found in report["backends"].items()},
        **{probe: report[probe] for probe in ("kernels", "renderer", "bundle", "cache")},
        **{f"[{extra}]": extra_text(extra, found) for extra, found in report["extras"].items()},
    }
    return "\n".join(f"{name:18} {value}" for name, value in rows.items())


def extra_text(extra: str, found: dict[str, str | None]) -> str:
    """The packages of an extra, or how to install them."""
    if None in found.values():
        missing = ", ".join(name for name, installed in found.items() if installed is None)
        return f"{missing} not installed: pip install '{DISTRIBUTION}[{extra}]'"
    return ", ".join(f"{name} {installed}" for name, installed in found.items())


def packages() -> dict[str, list[str]]:
    """What the distribution requires, by extra; "" is the base."""
    extras = metadata(DISTRIBUTION).get_all("Provides-Extra", [])
    groups: dict[str, list[str]] = {extra: [] for extra in ("", *extras)}
    for requirement in requires(DISTRIBUTION) or []:
        if match := REQUIREMENT.match(requirement):
            groups[match[2] or ""].append(match[1])
    return groups


def found(package: str) -> str | None:
    """The installed version, or None. Nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_gb() -> float | None:
    """Main memory, or None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def probed(probe: Callable[[], str]) -> str:
    """What the probe finds, or why it cannot."""
    try:
        return probe()
    except (CapHumanError, ImportError, OSError, RuntimeError) as error:  # the last of OpenVINO's libraries
        return f"not usable: {error}"


def backends() -> dict[str, str]:
    """What each backend can run on here, as --device takes it, the default first."""
    try:
        from ..backends import BACKENDS, open_backend
    except ImportError as error:
        return {"any": f"not usable: {error}"}

    def devices(name: str) -> str:
        return ", ".join(open_backend(name).devices())

    return {name: probed(partial(devices, name)) for name in BACKENDS}


def kernels() -> str:
    """The kernels of our own that this CPU can run, the fastest first."""
    from ..kernels import attention_kernels

    return ", ".join(attention_kernels()) or ("none: reinstall with a C++ compiler at hand, on Linux with an x86 CPU, "
                                              "for faster int8 bundles on OpenVINO")


def renderer() -> str:
    """The GL device, or the fallback with its reason."""
    from ..render import open_renderer

    opened = open_renderer("auto")
    try:
        return opened.notice or f"OpenGL on {opened.device}"
    finally:
        opened.close()


def embedded_bundle() -> str:
    """The embedded bundle, once it verifies."""
    from ..bundle import Bundle
    from .inspect import size_bytes

    bundle = Bundle.open()
    return f"{bundle.manifest.name}, {size_bytes(bundle) / 1e6:.1f} MB, {bundle.root}"


def cache() -> str:
    """The cache folder, what compiled models take of it, and whether it can be written."""
    from ..cache import cache_dir
    from ..compiled import used_bytes

    folder, kept = cache_dir(), used_bytes() / 1e6
    closed = "" if os.access(folder, os.W_OK) else " (cannot be written: set CAPHUMAN_CACHE)"
    return f"{folder}, compiled models {kept:.0f} MB{closed}"
