"""The console: a web application over the database, pages for people and a REST API for programs."""
