{% macro on_time_metrics() -%}
  count(*) as flights,
  count(*) filter (where is_cancelled) as cancelled,
  count(*) filter (where is_diverted) as diverted,
  count(*) filter (where is_on_time) as on_time,
  on_time / flights as on_time_share,
  avg(dep_delay) as avg_dep_delay,
  avg(arr_delay) as avg_arr_delay
{%- endmacro %}
