select
  origin,
  time_hour as observed_at,
  temp as temperature_f,
  humid as humidity_pct,
  if(wind_speed > 200, null, wind_speed) as wind_speed_mph,
  precip as precipitation_in,
  pressure as pressure_mbar,
  visib as visibility_mi
from {{ source('raw', 'weather') }}
