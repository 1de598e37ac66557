"""World models and policies that one trainer serves, each in a folder of its own."""
