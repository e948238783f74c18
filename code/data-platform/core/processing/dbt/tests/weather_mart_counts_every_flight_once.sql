{{ config(meta={'dagster': {'ref': {'name': 'delays_by_weather'}}}) }}

select *
from
  (select sum(flights) as in_mart from {{ ref('delays_by_weather') }}),
  (select count(*) as scheduled from {{ ref('stg_flights') }})
where in_mart != scheduled
