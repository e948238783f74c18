select
  flight_date,
  {{ on_time_metrics() }}
from {{ ref('stg_flights') }}
group by flight_date
