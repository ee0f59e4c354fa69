"""What is known of families and serving stacks: tables and configs, never a weight."""
