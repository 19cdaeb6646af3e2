-- Where Celery's workers write how their tasks ended. They have no way into Airflow's database.
\getenv password POSTGRES_CELERY_PASSWORD
CREATE ROLE celery LOGIN PASSWORD :'password';
CREATE DATABASE celery OWNER celery;
-- By default whoever may log in may enter every database.
REVOKE ALL ON DATABASE airflow, postgres, celery FROM PUBLIC;
