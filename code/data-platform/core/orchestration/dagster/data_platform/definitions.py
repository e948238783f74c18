"""What Dagster loads: `dagster dev -m data_platform.definitions`."""

import dagster as dg

from data_platform import assets
from data_platform.jobs import everything, land_files, publish_warehouse, refresh_marts, smoke
from data_platform.resources import RESOURCES
from data_platform.schedules import daily_refresh
from data_platform.sensors import changed_warehouse, landing_folder

defs = dg.Definitions(
    assets=dg.load_assets_from_package_module(assets),
    asset_checks=dg.load_asset_checks_from_package_module(assets),
    jobs=[everything, land_files, publish_warehouse, refresh_marts, smoke],
    schedules=[daily_refresh],
    sensors=[changed_warehouse, landing_folder],
    resources=RESOURCES,
    executor=dg.in_process_executor,
)
