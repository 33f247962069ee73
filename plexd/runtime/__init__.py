"""What runs tasks and knows no feature: supervisor, waiting, threads, clocks."""
