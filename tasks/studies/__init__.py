"""Research on targets: several seeds, curves, tables of variants; none of it is a stage."""
