"""What is made of results alone: paired statistics, comparisons, tables, plots and pages."""
