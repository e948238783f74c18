select
  date_trunc('month', flight_date)::date as flight_month,
  {{ on_time_metrics() }}
from {{ ref('stg_flights') }}
group by flight_month
