with flights_with_weather as (
  select
    flights.*,
    case
      when weather.observed_at is null then 'unknown'
      when weather.precipitation_in > 0 then 'precipitation'
      when weather.visibility_mi < 3 then 'low visibility'
      when weather.wind_speed_mph >= 20 then 'strong wind'
      else 'fair'
    end as weather
  from {{ ref('stg_flights') }} as flights
  left join {{ ref('stg_weather') }} as weather
    on flights.origin = weather.origin
    and flights.scheduled_hour = weather.observed_at
)

select
  origin,
  weather,
  {{ on_time_metrics() }}
from flights_with_weather
group by origin, weather
