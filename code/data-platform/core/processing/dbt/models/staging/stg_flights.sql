select
  make_date(year, month, day) as flight_date,
  time_hour as scheduled_hour,
  carrier,
  flight,
  tailnum,
  origin,
  dest,
  dep_delay,
  arr_delay,
  air_time,
  distance,
  dep_time is null as is_cancelled,
  dep_time is not null and arr_delay is null as is_diverted,
  coalesce(arr_delay < 15, false) as is_on_time
from {{ source('raw', 'flights') }}
