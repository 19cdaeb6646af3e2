"""What Airflow needs to run sweeps: operators, DAG params made from the configuration, a demo.

Airflow knows qsens; qsens never imports Airflow. Nothing here imports torch: every operator runs
the command line in a fresh interpreter.
"""
