def checks(subject): return iter(())
