"""What `srlm-lite doctor` looks at: the machine, the packages, the recipes, and a proof."""
