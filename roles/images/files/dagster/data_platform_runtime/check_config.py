"""Check a Dagster home with Dagster's own parsers.

Run as ``python -m data_platform_runtime.check_config FILE``, where FILE is a dagster.yaml or a workspace.yaml: exits
with 0 if Dagster accepts it, else with 1 and Dagster's reasons on standard error.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml


def check(file: Path) -> None:
    """Parse ``file``, a workspace if it has the key ``load_from``, else an instance.

    Raises:
        Exception: Dagster does not accept the file; the text says why.
    """
    content = yaml.safe_load(file.read_text())
    if isinstance(content, dict) and "load_from" in content:
        from dagster._core.workspace.load import location_origins_from_config

        location_origins_from_config(content, str(file))
        return

    from dagster._config import process_config, resolve_to_config_type
    from dagster._core.instance.ref import InstanceRef
    from dagster._serdes import class_from_code_pointer
    from dagster._serdes.config_class import ConfigurableClassData

    with tempfile.TemporaryDirectory() as home:
        Path(home, "dagster.yaml").write_text(file.read_text())
        reference = InstanceRef.from_dir(home)
    for part in reference:
        if isinstance(part, ConfigurableClassData):
            component = class_from_code_pointer(part.module_name, part.class_name)
            result = process_config(
                resolve_to_config_type(component.config_type()), yaml.safe_load(part.config_yaml) or {}
            )
            if not result.success:
                raise ValueError(f"{part.class_name}: {'; '.join(error.message for error in result.errors)}")


def main(arguments: list[str]) -> int:
    """Check the file named in ``arguments``; give the exit status."""
    try:
        check(Path(arguments[0]))
    except Exception as error:
        print(f"Dagster does not accept this configuration: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
