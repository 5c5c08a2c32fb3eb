"""Systems, answers, grades, tables and figures."""
