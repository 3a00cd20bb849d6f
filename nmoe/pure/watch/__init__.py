"""What a run tells: metrics, alerts, validations."""
