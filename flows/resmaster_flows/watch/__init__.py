"""What people see while a build runs: terminal, Prefect page, artifacts."""
