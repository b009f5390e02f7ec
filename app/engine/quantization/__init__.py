"""fp8 and int8 linear layers, their selection and cache; knows no pipeline and no jobs."""
