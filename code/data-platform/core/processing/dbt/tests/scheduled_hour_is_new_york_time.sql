{{ config(meta={'dagster': {'ref': {'name': 'stg_flights'}}}) }}

select flight_date, scheduled_hour
from {{ ref('stg_flights') }}
where (scheduled_hour at time zone 'America/New_York')::date != flight_date
