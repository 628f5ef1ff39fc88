"""What is made of the figures of a demo or a validation: tables, pictures, and how they are measured."""
