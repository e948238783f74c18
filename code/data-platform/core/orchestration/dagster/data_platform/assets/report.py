"""Reports: what people look at."""

import base64
import io

import dagster as dg

from data_platform.resources import DUCKDB_POOL, Warehouse, preview

ON_TIME_MONTHLY = dg.AssetKey(["marts", "on_time_monthly"])


def plot_shares(months: list[str], shares: list[float]) -> str:
    """Return a line chart of shares (0 to 1) by month as a Markdown image with inlined PNG data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(months, [100 * share for share in shares], marker="o")
    axes.set(ylabel="on time, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=80)
    return f"![On-time arrivals by month](data:image/png;base64,{base64.b64encode(image.getvalue()).decode()})"


@dg.asset(
    key=["reports", "on_time_report"],
    group_name="reports",
    deps=[ON_TIME_MONTHLY],
    kinds={"duckdb", "matplotlib"},
    pool=DUCKDB_POOL,
)
def on_time_report(warehouse: Warehouse) -> dg.MaterializeResult:
    """The share of scheduled flights that arrived on time, month by month, as a table and a plot."""
    with warehouse.connect(read_only=True) as connection:
        rows = connection.execute(
            "select strftime(flight_month, '%b'), on_time_share from marts.on_time_monthly order by flight_month"
        ).fetchall()
        table = preview(connection, "from marts.on_time_monthly order by flight_month", rows=12)
    months, shares = zip(*rows, strict=True)
    return dg.MaterializeResult(
        metadata={
            "plot": dg.MetadataValue.md(plot_shares(list(months), list(shares))),
            "table": table,
            "best_month": months[shares.index(max(shares))],
            "worst_month": months[shares.index(min(shares))],
        }
    )
