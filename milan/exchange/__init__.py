"""Networks in the forms of other libraries."""
