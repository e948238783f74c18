select
  carrier,
  airline,
  origin,
  dest,
  any_value(distance) as distance,
  {{ on_time_metrics() }}
from {{ ref('stg_flights') }}
join {{ ref('stg_airlines') }} using (carrier)
group by carrier, airline, origin, dest
