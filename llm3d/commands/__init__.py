"""What a user does with a model beside training it: evaluate, generate, export, look at samples."""
